// AMX: one instruction multiplies 16 rows by 64 positions of 16 outputs. The sums of a group leave the tiles through memory,
// as integers, and AVX-512 makes floating point of them while the next groups are multiplied.
#include "matrices.h"

#include <type_traits>

#include "instruction_set.h"

// Where the compiler knows these instructions, its assembler does.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && __has_include(<amxtileintrin.h>)

#ifdef QUANTFORMER_EMULATE_AVX512
#include "emulated_avx512.h"
#else
#include <immintrin.h>
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // as in avx512.cpp
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni")))
#endif
#define INLINE TARGET __attribute__((always_inline)) inline

#ifdef QUANTFORMER_EMULATE_AMX
#include "emulated_amx.h"  // tests/native: for machines without it, and so that the address sanitizer sees what it reads
#else
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace quantformer {
namespace {

#ifndef QUANTFORMER_EMULATE_AMX
// Linux gives the tiles to a process that asks for them (arch/x86/include/uapi/asm/prctl.h).
constexpr int kRequestPermission = 0x1023, kTileData = 18;

bool available() {
  return __builtin_cpu_supports("amx-int8") && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// By hand: the compilers' own functions take numbers of tiles as text alone, and theirs that loads a configuration does not
// say that it reads all of it.
void configure(const void* tiles) { asm volatile("ldtilecfg %0" ::"m"(*static_cast<const uint8_t(*)[64]>(tiles))); }
void release() { asm volatile("tilerelease"); }

template <int kTile>
INLINE void zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
// Of what is read and written they say just that: the floating-point sums would not stay in registers if it might be anything.
template <int kTile>
INLINE void load(const void* rows) {
  const auto& all = *static_cast<const uint8_t(*)[kMatrixBytes]>(rows);
  asm volatile("tileloadd (%1,%2), %%tmm%c0" ::"i"(kTile), "r"(rows), "r"(int64_t{kMatrixPositions}), "m"(all));
}
// The same of what is not soon read again, so that it does not take the place of what is.
template <int kTile>
INLINE void load_once(const void* rows) {
  const auto& all = *static_cast<const uint8_t(*)[kMatrixBytes]>(rows);
  asm volatile("tileloaddt1 (%1,%2), %%tmm%c0" ::"i"(kTile), "r"(rows), "r"(int64_t{kMatrixPositions}), "m"(all));
}
template <int kTile>
INLINE void store(int32_t* rows) {
  auto& all = *reinterpret_cast<int32_t(*)[kMatrixRows * kPanel]>(rows);
  asm volatile("tilestored %%tmm%c1, (%2,%3)" : "=m"(all) : "i"(kTile), "r"(rows), "r"(int64_t{4 * kPanel}));
}
// Products of bytes without and with a sign.
template <int kSums, int kX, int kWeights>
INLINE void multiply() {
  asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kX), "i"(kWeights));
}
#endif

// All tiles alike: 16 rows of 64 bytes.
void begin() {
  struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes_of_row[16];
    uint8_t rows[16];
  } tiles = {};
  static_assert(sizeof tiles == 64, "as the processor reads it");
  tiles.palette = 1;
  for (int i = 0; i < 8; ++i) {
    tiles.bytes_of_row[i] = kMatrixPositions;
    tiles.rows[i] = kMatrixRows;
  }
  configure(&tiles);
}

TARGET void prepare(const uint8_t* codes, int64_t stride, int64_t rows, const MatrixStep* steps, int64_t num_steps,
                    uint8_t* x) {
  for (const MatrixStep* step = steps; step != steps + num_steps; ++step) {
    const uint64_t there = ~uint64_t{0} >> (kMatrixPositions - step->positions);
    for (int64_t r = 0; r < kMatrixRows; ++r, x += kMatrixPositions) {
      const uint64_t mask = r < rows ? there : 0;
      _mm512_storeu_si512(x, _mm512_maskz_loadu_epi8(mask, codes + (r < rows ? r * stride + step->first : 0)));
    }
  }
}

using Integers = int32_t[kMatrixRows * kPanel];

// What is multiplied side by side: kRows blocks of rows by kPanels panels. Sums of a tile wait for the step before longer than a
// step takes, and each matrix that is loaded is used twice.
template <int kRows, int kPanels>
INLINE void multiply_steps(const MatrixProduct& p, const uint8_t* x) {
  const int64_t block_bytes = p.num_steps * kMatrixBytes;
  zero<0>();
  if constexpr (kPanels == 2) zero<1>();
  if constexpr (kRows == 2) zero<2>();
  if constexpr (kRows == 2 && kPanels == 2) zero<3>();
  for (const MatrixStep* step = p.steps; step != p.steps + p.num_steps; ++step, x += kMatrixBytes) {
    const int8_t* const panel = p.panels + step->first * kPanel;
    load<4>(x);
    load<6>(panel);
    multiply<0, 4, 6>();
    if constexpr (kPanels == 2) {
      load<7>(panel + p.panel_step);
      multiply<1, 4, 7>();
    }
    if constexpr (kRows == 2) {
      load<5>(x + block_bytes);
      multiply<2, 5, 6>();
      if constexpr (kPanels == 2) multiply<3, 5, 7>();
    }
  }
}

// What `Tile` says of one group, of the first `rows` of a matrix.
INLINE void write(const MatrixProduct& p, const Integers& integers, int64_t column, int64_t rows, float* y) {
  const __m512 group_scale = _mm512_set1_ps(p.group_scales[0]);
  const __m512 scale = _mm512_loadu_ps(p.scale + column), bias = _mm512_loadu_ps(p.bias + column);
  for (int64_t r = 0; r < rows; ++r) {
    const __m512 numbers = _mm512_cvtepi32_ps(_mm512_load_si512(integers + r * kPanel));
    const __m512 sums = _mm512_add_ps(_mm512_setzero_ps(), _mm512_mul_ps(numbers, group_scale));
    _mm512_storeu_ps(y + column + r * p.y_stride, _mm512_add_ps(_mm512_mul_ps(sums, scale), bias));
  }
}

// Where all positions are one group.
TARGET void multiply_one_group(const MatrixProduct& p) {
  static_assert(kMatrixPanels == 2, "the sums of two blocks of rows and two panels are four tiles");
  alignas(64) Integers integers[2][kMatrixPanels];
  const bool two = p.num_panels == 2;
  const uint8_t* x = p.x;
  float* y = p.y;
  for (int64_t row = 0; row < p.rows; row += 2 * kMatrixRows, x += 2 * p.num_steps * kMatrixBytes) {
    const bool both = p.rows - row > kMatrixRows;
    if (both) {
      two ? multiply_steps<2, 2>(p, x) : multiply_steps<2, 1>(p, x);
    } else {
      two ? multiply_steps<1, 2>(p, x) : multiply_steps<1, 1>(p, x);
    }
    store<0>(integers[0][0]);
    if (two) store<1>(integers[0][1]);
    if (both) store<2>(integers[1][0]);
    if (both && two) store<3>(integers[1][1]);
    for (int block = 0; block < (both ? 2 : 1); ++block, y += p.y_step) {
      const int64_t first = row + block * kMatrixRows, rows = p.rows - first;
      for (int64_t at = 0; at < p.num_panels; ++at) {
        if (rows >= kMatrixRows) {
          // A number that the compiler knows.
          write(p, integers[block][at], at * kPanel, kMatrixRows, y);
        } else {
          write(p, integers[block][at], at * kPanel, rows, y);
        }
      }
      if (p.made != nullptr) p.made(p.context, first);
    }
  }
}

// Groups in work at a time. While one is multiplied, the integers of that two before it leave the tiles, and those of that three
// before it become floating point: each would wait long for what comes before it.
constexpr int kSlots = 4, kStored = 2, kAdded = 3;

template <int kSlot>
INLINE void multiply_group(const MatrixStep*& step, const uint8_t*& x, const int8_t* panel) {
  constexpr int kX = kSlots + kSlot % 2, kWeights = kX + 2;
  zero<kSlot>();
  do {
    load_once<kX>(x);
    load<kWeights>(panel + step->first * kPanel);
    multiply<kSlot, kX, kWeights>();
    x += kMatrixBytes;
  } while (!(step++)->last);
}

TARGET void multiply_groups(const MatrixProduct& p) {
  alignas(64) Integers integers[kSlots];
  const int64_t groups = p.num_groups, count = (p.rows + kMatrixRows - 1) / kMatrixRows * p.num_panels * groups;
  const float* const group_scales = p.group_scales;
  const MatrixStep *step = p.steps, *const end = p.steps + p.num_steps;
  const uint8_t* x = p.x;
  const int64_t panel_end = p.num_panels;
  const int8_t* panel = p.panels;
  int64_t panel_at = 0;  // of what is multiplied
  float* y = p.y;
  int64_t group = 0, row = 0, column = 0;  // of what is added up
  // Loops over rows are unrolled: an array that is indexed at run time lies in memory.
  __m512 sums[kMatrixRows];
#pragma GCC unroll 16
  for (int r = 0; r < kMatrixRows; ++r) sums[r] = _mm512_setzero_ps();

  int64_t i = 0;
  const auto is_group = [&](int64_t i) { return i >= 0 && i < count; };
  // All in one function: if it called another one for the sums, GCC 12 would leave them in memory.
  const auto turn = [&](auto slot) TARGET __attribute__((always_inline)) {
    constexpr int kSlot = slot, kStore = (kSlot + kSlots - kStored) % kSlots, kAdd = (kSlot + kSlots - kAdded) % kSlots;
    if (is_group(i)) {
      multiply_group<kSlot>(step, x, panel);
      if (step == end) {
        // The same rows by the next panel, or the next rows.
        step = p.steps;
        panel += p.panel_step;
        if (++panel_at < panel_end) {
          x -= p.num_steps * kMatrixBytes;
        } else {
          panel_at = 0;
          panel = p.panels;
        }
      }
    }
    if (is_group(i - kStored)) store<kStore>(integers[kStore]);
    if (!is_group(i++ - kAdded)) return;
    const __m512 scale = _mm512_set1_ps(group_scales[group]);
#pragma GCC unroll 16
    for (int r = 0; r < kMatrixRows; ++r) {
      const __m512 numbers = _mm512_cvtepi32_ps(_mm512_load_si512(integers[kAdd] + r * kPanel));
      sums[r] = _mm512_add_ps(sums[r], _mm512_mul_ps(numbers, scale));
    }
    if (++group < groups) return;
    const __m512 output_scale = _mm512_loadu_ps(p.scale + column), bias = _mm512_loadu_ps(p.bias + column);
    const int64_t rows = p.rows - row, stride = p.y_stride;
#pragma GCC unroll 16
    for (int r = 0; r < kMatrixRows; ++r) {
      if (r < rows) _mm512_storeu_ps(y + column + r * stride, _mm512_add_ps(_mm512_mul_ps(sums[r], output_scale), bias));
    }
    group = 0;
    column += kPanel;
    if (column == panel_end * kPanel) {
      if (p.made != nullptr) p.made(p.context, row);
      column = 0;
      row += kMatrixRows;
      y += p.y_step;
    }
#pragma GCC unroll 16
    for (int r = 0; r < kMatrixRows; ++r) sums[r] = _mm512_setzero_ps();
  };
  while (i < count + kAdded) {
    turn(std::integral_constant<int, 0>());
    turn(std::integral_constant<int, 1>());
    turn(std::integral_constant<int, 2>());
    turn(std::integral_constant<int, 3>());
  }
}

void multiply(const MatrixProduct& p) { p.num_groups == 1 ? multiply_one_group(p) : multiply_groups(p); }

}  // namespace

const InstructionSet* amx() {
  static const bool there = avx512() != nullptr && available();
  if (!there) return nullptr;
  static const Matrices matrices = {prepare, begin, release, multiply};
  static const InstructionSet set = [] {
    InstructionSet made = *avx512();
    made.name = "amx";
    made.matrices = &matrices;
    return made;
  }();
  return &set;
}

}  // namespace quantformer

#else
namespace quantformer {
const InstructionSet* amx() { return nullptr; }
}  // namespace quantformer
#endif
