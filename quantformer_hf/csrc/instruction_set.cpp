#include "instruction_set.h"

#include <atomic>
#include <cstring>
#include <initializer_list>

#include "kernels.h"

namespace quantformer {
namespace {

const InstructionSet* best() {
  for (auto find : {amx, avx512, avx2, neon_dotprod, neon}) {
    if (const InstructionSet* set = find()) return set;
  }
  return plain();
}

std::atomic<const InstructionSet*> chosen{nullptr};

}  // namespace

const InstructionSet& current() {
  const InstructionSet* set = chosen.load(std::memory_order_relaxed);
  if (set == nullptr) {
    set = best();
    chosen.store(set, std::memory_order_relaxed);
  }
  return *set;
}

}  // namespace quantformer

extern "C" const char* quantformer_instruction_set() { return quantformer::current().name; }

extern "C" int quantformer_use_instruction_set(const char* name) {
  using namespace quantformer;
  for (auto find : {plain, avx2, avx512, amx, neon, neon_dotprod}) {
    const InstructionSet* set = find();
    if (set != nullptr && std::strcmp(set->name, name) == 0) {
      chosen.store(set, std::memory_order_relaxed);
      return 0;
    }
  }
  return -1;
}
