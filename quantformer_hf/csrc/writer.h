// Where what a product gives is put.
#pragma once

#include <algorithm>
#include <cstdint>

#include "instruction_set.h"
#include "product.h"
#include "scratch.h"

namespace quantformer {

// The order in which outputs lie, and how many places there are: those of the codes that they become.
inline const int32_t* order_of(const Codes* then) { return then == nullptr ? nullptr : then->source; }
inline int64_t places_of(const Product& p, const Codes* then) { return then == nullptr ? p.outputs : then->positions; }

// Whether panels of its weights lie in the order in which they are read.
inline bool in_order(const Product& p, const Codes* then) {
  return p.ordered != nullptr && p.ordered_bits > 0 && p.output_order == order_of(then);
}

// The output that is at a place, as many as there are or more where there is none.
inline int64_t output_at(const int32_t* order, int64_t places, int64_t place) {
  return order != nullptr && place < places ? int64_t{order[place]} : place;
}

// Takes panels of kWidth outputs, tile by tile: numbers go to their place, and where there is a `then` they become codes while
// they are in cache.
template <int64_t kWidth>
class Writer {
 public:
  Writer(const Product& product, const Codes* then, const InstructionSet& set, int64_t tile_rows, Scratch& scratch)
      : product_(product), then_(then), set_(set), tile_size_(tile_rows * kWidth) {
    narrow_ = scratch.take<float>(tile_size_);
    scale_ = scratch.take<float>(kWidth);
    bias_ = scratch.take<float>(kWidth);
    offset_ = scratch.take<float>(tile_size_);
    inverse_ = scratch.take<float>(tile_size_);
    codes_ = scratch.take<uint8_t>(tile_size_);
    // A tile may leave out what lies beyond the last output.
    std::fill_n(narrow_, tile_size_, 0.0f);
  }

  static size_t scratch_bytes(int64_t tile_rows) {
    return kWidth * (tile_rows * (3 * sizeof(float) + 1) + 2 * sizeof(float));
  }

  // The panel that begins at `place`.
  void begin(int64_t place) {
    const int64_t places = places_of(product_, then_);
    place_ = place;
    outputs_ = std::min(kWidth, places - place);
    in_place_ = then_ == nullptr && outputs_ == kWidth;
    for (int64_t i = 0; i < kWidth; ++i) {
      const int64_t output = output_at(order_of(then_), places, place + i);
      const bool none = output >= product_.outputs;
      scale_[i] = none ? 0 : product_.scale[output];
      bias_[i] = none ? 0 : product_.bias[output];
      if (then_ == nullptr) continue;
      // Zeros, which make code 0.
      offset_[i] = none ? 0 : then_->offset[output];
      inverse_[i] = none ? 0 : then_->inverse[output];
    }
    // Of a tile, the same for each of its rows.
    for (int64_t i = kWidth; then_ != nullptr && i < tile_size_; i += kWidth) {
      std::copy_n(offset_, kWidth, offset_ + i);
      std::copy_n(inverse_, kWidth, inverse_ + i);
    }
  }

  const float* scale() const { return scale_; }
  const float* bias() const { return bias_; }

  // Where the tile that begins at `row` is to be made, and elements from row to row there.
  float* y(int64_t row) const { return in_place_ ? product_.y + row * product_.y_stride + place_ : narrow_; }
  int64_t y_stride() const { return in_place_ ? product_.y_stride : kWidth; }

  // It has been made.
  void end(int64_t row, int64_t rows) {
    if (in_place_) return;
    if (then_ == nullptr) {
      for (int64_t r = 0; r < rows; ++r) {
        std::copy_n(narrow_ + r * kWidth, outputs_, product_.y + (row + r) * product_.y_stride + place_);
      }
      return;
    }
    if (then_->gelu) set_.gelu(narrow_, rows * kWidth, narrow_);
    set_.quantize(narrow_, offset_, inverse_, levels_up_to(then_->largest, then_->knee), rows * kWidth, codes_);
    const int64_t stride = then_->stride == 0 ? then_->positions : then_->stride, outputs = outputs_;
    // Bytes that are written might be anything: what this class knows is not to be looked up after each.
    const uint8_t* from = codes_;
    uint8_t* to = then_->codes + row * stride + place_;
    for (int64_t r = 0; r < rows; ++r, from += kWidth, to += stride) {
      // A size that the compiler knows takes no call.
      if (outputs == kWidth) {
        std::copy_n(from, kWidth, to);
      } else {
        std::copy_n(from, outputs, to);
      }
    }
  }

 private:
  const Product& product_;
  const Codes* const then_;
  const InstructionSet& set_;
  const int64_t tile_size_;
  int64_t place_ = 0, outputs_ = 0;
  bool in_place_ = false;
  float *narrow_, *scale_, *bias_, *offset_, *inverse_;
  uint8_t* codes_;
};

}  // namespace quantformer
