// AVX-512 by SIMDe, for machines without it: what avx512.cpp includes in place of <immintrin.h> in this test's build.
#pragma once

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

#include <cmath>

#define TARGET

// SIMDe 0.7.4 lacks these.
#ifndef _mm512_cvtepi32_ps
inline __m512 _mm512_cvtepi32_ps(__m512i integers) {
  const simde__m512i_private from = simde__m512i_to_private(integers);
  simde__m512_private to;
  for (int i = 0; i < 16; ++i) to.f32[i] = static_cast<float>(from.i32[i]);
  return simde__m512_from_private(to);
}
#endif
#ifndef _mm512_cvtps_epi32
inline __m512i _mm512_cvtps_epi32(__m512 numbers) {
  const simde__m512_private from = simde__m512_to_private(numbers);
  simde__m512i_private to;
  for (int i = 0; i < 16; ++i) to.i32[i] = static_cast<int32_t>(std::nearbyint(from.f32[i]));
  return simde__m512i_from_private(to);
}
#endif
#ifndef _mm512_cvtepi32_epi8
inline __m128i _mm512_cvtepi32_epi8(__m512i integers) {
  const simde__m512i_private from = simde__m512i_to_private(integers);
  simde__m128i_private to;
  for (int i = 0; i < 16; ++i) to.i8[i] = static_cast<int8_t>(from.i32[i]);
  return simde__m128i_from_private(to);
}
#endif
#ifndef _mm512_maskz_loadu_epi8
inline __m512i _mm512_maskz_loadu_epi8(uint64_t mask, const void* bytes) {
  simde__m512i_private to;
  for (int i = 0; i < 64; ++i) to.u8[i] = mask >> i & 1 ? static_cast<const uint8_t*>(bytes)[i] : 0;
  return simde__m512i_from_private(to);
}
#endif
#ifndef _mm512_maskz_loadu_ps
inline __m512 _mm512_maskz_loadu_ps(uint16_t mask, const void* numbers) {
  simde__m512_private to;
  for (int i = 0; i < 16; ++i) to.f32[i] = mask >> i & 1 ? static_cast<const float*>(numbers)[i] : 0;
  return simde__m512_from_private(to);
}
#endif
#ifndef _mm_mask_storeu_epi8
inline void _mm_mask_storeu_epi8(void* bytes, uint16_t mask, __m128i from) {
  const simde__m128i_private lanes = simde__m128i_to_private(from);
  for (int i = 0; i < 16; ++i) {
    if (mask >> i & 1) static_cast<int8_t*>(bytes)[i] = lanes.i8[i];
  }
}
#endif
