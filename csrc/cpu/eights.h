// Eight 16-bit numbers at once, by hand: what no compiler makes of convert.h. For code that
// __builtin_cpu_supports("x86-64-v3") guards.
#pragma once
#include "cpu/convert.h"
#ifdef BEFT_F16C
#include <immintrin.h>

namespace beft {

BEFT_F16C inline __m128i load_raw(const uint16_t* p) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
}
BEFT_F16C inline void store_raw(uint16_t* p, __m128i x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), x);
}

// `follows` says that every x rounds to its number at p; it may say no where that is so.
struct F16x8 {
  using One = F16;
  static BEFT_F16C __m128i rounded(__m256 x) {
    return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
  }
  static BEFT_F16C __m256 load(const uint16_t* p) { return _mm256_cvtph_ps(load_raw(p)); }
  static BEFT_F16C void store(uint16_t* p, __m256 x) { store_raw(p, rounded(x)); }
  static BEFT_F16C bool follows(const uint16_t* p, __m256 x) {
    const __m128i differ = _mm_xor_si128(rounded(x), load_raw(p));
    return _mm_testz_si128(differ, differ);
  }
};

struct BF16x8 {
  using One = BF16;
  static BEFT_F16C __m256i not_a_number(__m256 x) {
    return _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  }
  static BEFT_F16C __m256i bits(const uint16_t* p) {
    return _mm256_slli_epi32(_mm256_cvtepu16_epi32(load_raw(p)), 16);
  }
  static BEFT_F16C __m256 load(const uint16_t* p) { return _mm256_castsi256_ps(bits(p)); }
  static BEFT_F16C void store(uint16_t* p, __m256 x) {
    const __m256i own = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(own, 16), _mm256_set1_epi32(1));
    const __m256i half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
    const __m256i nan = _mm256_set1_epi32(0x7fc00000);
    const __m256i whole = _mm256_srli_epi32(
        _mm256_blendv_epi8(_mm256_add_epi32(own, half), nan, not_a_number(x)), 16);
    store_raw(p,
              _mm_packus_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1)));
  }
  // Bits of neighbours of one sign are neighbours: within half a step they differ by less than
  // 2^15, and just half a step is left to a closer look.
  static BEFT_F16C bool follows(const uint16_t* p, __m256 x) {
    const __m256i apart = _mm256_abs_epi32(_mm256_sub_epi32(_mm256_castps_si256(x), bits(p)));
    return _mm256_testz_si256(_mm256_or_si256(apart, not_a_number(x)), _mm256_set1_epi32(~0x7fff));
  }
};

BEFT_F16C inline float sum_of(__m256 x) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

}  // namespace beft
#endif
