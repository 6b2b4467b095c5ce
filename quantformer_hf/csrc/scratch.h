// Memory of a thread that is kept from call to call: allocated once, and then only grown.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace quantformer {

class Scratch {
 public:
  // Room for `bytes` in all, besides what alignment takes. What was there before is lost.
  void reserve(size_t bytes) {
    used_ = 0;
    if (memory_.size() < bytes + kGaps) memory_.resize(bytes + kGaps);
  }

  // The next `count` elements, aligned to a cache line.
  template <typename T>
  T* take(size_t count) {
    const size_t at = (used_ + kLine - 1) / kLine * kLine;
    used_ = at + count * sizeof(T);
    const size_t shift = (kLine - reinterpret_cast<uintptr_t>(memory_.data()) % kLine) % kLine;
    return reinterpret_cast<T*>(memory_.data() + shift + at);
  }

 private:
  static constexpr size_t kLine = 64, kGaps = 16 * kLine;
  std::vector<uint8_t> memory_;
  size_t used_ = 0;
};

}  // namespace quantformer
