// AVX-512 by SIMDe, for machines without it: what avx512.cpp includes in place of <immintrin.h> in this test's build.
#pragma once

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

#define TARGET

// SIMDe 0.7.4 lacks it.
#ifndef _mm512_cvtepi32_ps
inline __m512 _mm512_cvtepi32_ps(__m512i integers) {
  const simde__m512i_private from = simde__m512i_to_private(integers);
  simde__m512_private to;
  for (int i = 0; i < 16; ++i) to.f32[i] = static_cast<float>(from.i32[i]);
  return simde__m512_from_private(to);
}
#endif
