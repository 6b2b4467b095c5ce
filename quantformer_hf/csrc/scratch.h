// Memory of a thread that is kept from call to call: allocated once, and then only grown.
#pragma once

#include <algorithm>
#include <cassert>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif
#if __has_include(<sanitizer/asan_interface.h>)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(memory, bytes)
#define ASAN_UNPOISON_MEMORY_REGION(memory, bytes)
#endif

namespace quantformer {

class Scratch {
 public:
  // Room for `bytes` in all, besides what alignment takes. What was there before is lost.
  void reserve(size_t bytes) {
    used_ = 0;
    left_ = bytes;
    if (memory_.size() < bytes + kGaps) memory_.resize(bytes + kGaps);
  }

  // The next `count` elements, aligned to a cache line.
  template <typename T>
  T* take(size_t count) {
    assert(count * sizeof(T) <= left_);
    left_ -= count * sizeof(T);
    const size_t at = (used_ + kLine - 1) / kLine * kLine;
    used_ = at + count * sizeof(T);
    const size_t shift = (kLine - reinterpret_cast<uintptr_t>(memory_.data()) % kLine) % kLine;
    return reinterpret_cast<T*>(memory_.data() + shift + at);
  }

 private:
  static constexpr size_t kLine = 64, kGaps = 16 * kLine;
  std::vector<uint8_t> memory_;
  size_t used_ = 0, left_ = 0;
};

// Memory that a call has for itself, and gives back to its thread, which keeps some for later calls: fresh pages cost more
// than what small models do with them. It is cut from regions of huge pages, the lowest place first: small pages would push
// those of all others, such as Python's modules, out of what the processor knows of addresses.
class Pool {
 public:
  template <typename T>
  struct Return {
    int64_t bytes;
    void operator()(T* memory) const { of_thread().give({reinterpret_cast<uint8_t*>(memory), bytes}); }
  };
  template <typename T>
  using Buffer = std::unique_ptr<T[], Return<T>>;

  // Not initialised, and aligned to a cache line.
  template <typename T>
  static Buffer<T> take(int64_t count) {
    const int64_t used = count * static_cast<int64_t>(sizeof(T));
    // With a line between two of them, where sanitizers see who goes too far.
    const Block found = of_thread().find((used / kLine + 2) * kLine);
    ASAN_UNPOISON_MEMORY_REGION(found.memory, used);
    return Buffer<T>(reinterpret_cast<T*>(found.memory), Return<T>{found.bytes});
  }

  ~Pool() {
    for (const Region& region : regions_) release(region.all.memory);
  }

 private:
  struct Block {
    uint8_t* memory;
    int64_t bytes;

    uint8_t* end() const { return memory + bytes; }
  };

  // `free` by address, no two of them side by side.
  struct Region {
    Block all;
    std::vector<Block> free;
  };

  static constexpr int64_t kLine = 64;
  static constexpr int64_t kHugePage = int64_t{1} << 21;
  // Of the first region, which stays. What of it was never used takes no memory.
  static constexpr int64_t kKeptBytes = int64_t{1} << 24;
  // Buffers that a call has at once are fewer.
  static constexpr size_t kMostBlocks = 64;

  static constexpr std::align_val_t kAlignment{kHugePage};
  static void release(uint8_t* memory) noexcept { ::operator delete(memory, kAlignment); }

  static Pool& of_thread() {
    thread_local Pool pool;
    return pool;
  }

  Block find(int64_t bytes) {
    for (Region& region : regions_) {
      for (auto place = region.free.begin(); place != region.free.end(); ++place) {
        if (place->bytes < bytes) continue;
        const Block found{place->memory, bytes};
        *place = {found.end(), place->bytes - bytes};
        if (place->bytes == 0) region.free.erase(place);
        return found;
      }
    }
    add_region(bytes);
    return find(bytes);
  }

  void add_region(int64_t bytes) {
    const int64_t size = regions_.empty() ? kKeptBytes : (bytes + kHugePage - 1) / kHugePage * kHugePage;
    Region region{{nullptr, size}, {}};
    region.free.reserve(kMostBlocks);
    regions_.reserve(regions_.size() + 1);
    region.all.memory = static_cast<uint8_t*>(::operator new(size, kAlignment));
#ifdef MADV_HUGEPAGE
    // Where the system has none, it goes on without.
    madvise(region.all.memory, size, MADV_HUGEPAGE);
#endif
    ASAN_POISON_MEMORY_REGION(region.all.memory, size);
    region.free.push_back(region.all);
    regions_.push_back(std::move(region));
  }

  void give(Block block) noexcept {
    ASAN_POISON_MEMORY_REGION(block.memory, block.bytes);
    const auto region = std::find_if(regions_.begin(), regions_.end(), [&](const Region& region) {
      return region.all.memory <= block.memory && block.end() <= region.all.end();
    });
    auto& free = region->free;
    auto after = std::find_if(free.begin(), free.end(), [&](const Block& other) { return other.memory > block.memory; });
    if (after != free.end() && block.end() == after->memory) {
      block.bytes += after->bytes;
      after = free.erase(after);
    }
    if (after != free.begin() && (after - 1)->end() == block.memory) {
      (after - 1)->bytes += block.bytes;
    } else {
      free.insert(after, block);
    }
    if (region != regions_.begin() && free.front().bytes == region->all.bytes) {
      ASAN_UNPOISON_MEMORY_REGION(region->all.memory, region->all.bytes);
      release(region->all.memory);
      regions_.erase(region);
    }
  }

  std::vector<Region> regions_;
};

}  // namespace quantformer
