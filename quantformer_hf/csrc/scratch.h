// Memory of a thread that is kept from call to call: allocated once, and then only grown.
#pragma once

#include <cassert>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

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
// than what small models do with them.
class Pool {
 public:
  template <typename T>
  struct Return {
    int64_t bytes;
    void operator()(T* memory) const { of_thread().give(reinterpret_cast<uint8_t*>(memory), bytes); }
  };
  template <typename T>
  using Buffer = std::unique_ptr<T[], Return<T>>;

  // Not initialised, and aligned to a cache line.
  template <typename T>
  static Buffer<T> take(int64_t count) {
    auto [memory, bytes] = of_thread().find(count * static_cast<int64_t>(sizeof(T)));
    return Buffer<T>(reinterpret_cast<T*>(memory), Return<T>{bytes});
  }

  ~Pool() {
    for (const Block& block : blocks_) release(block.memory);
  }

 private:
  struct Block {
    uint8_t* memory;
    int64_t bytes;
  };

  // Kept by one thread, at most.
  static constexpr int64_t kMostBytes = int64_t{1} << 24;
  static constexpr size_t kMostBlocks = 16;

  static constexpr std::align_val_t kAlignment{64};
  static void release(uint8_t* memory) noexcept { ::operator delete(memory, kAlignment); }

  static Pool& of_thread() {
    thread_local Pool pool;
    return pool;
  }

  // The smallest one that is large enough, or a new one.
  Block find(int64_t bytes) {
    size_t best = kMostBlocks;
    for (size_t i = 0; i < blocks_.size(); ++i) {
      if (blocks_[i].bytes >= bytes && (best == kMostBlocks || blocks_[i].bytes < blocks_[best].bytes)) best = i;
    }
    if (best == kMostBlocks) return {static_cast<uint8_t*>(::operator new(bytes, kAlignment)), bytes};
    const Block found = blocks_[best];
    blocks_.erase(blocks_.begin() + best);
    kept_ -= found.bytes;
    return found;
  }

  void give(uint8_t* memory, int64_t bytes) noexcept {
    if (blocks_.size() == kMostBlocks || kept_ + bytes > kMostBytes) {
      release(memory);
      return;
    }
    blocks_.push_back({memory, bytes});
    kept_ += bytes;
  }

  Pool() { blocks_.reserve(kMostBlocks); }

  std::vector<Block> blocks_;
  int64_t kept_ = 0;
};

}  // namespace quantformer
