// fp32 to and from the 16-bit types, in ways that vectorise; and the choice of the vector width.
#pragma once
#include <cstdint>
#include <cstring>

// The widest vectors of the machine at hand are chosen when the library is loaded, by feature:
// GCC matches a name like arch=haswell against that maker's processors alone. The choice runs
// before ThreadSanitizer has started, and would end in it.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_THREAD__)
#if __GNUC__ >= 12
#define BEFT_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
// For code of intrinsics that __builtin_cpu_supports("x86-64-v3") guards.
#define BEFT_F16C __attribute__((target("arch=x86-64-v3")))
#else
#define BEFT_CLONES __attribute__((target_clones("default", "avx2", "avx512f")))
#endif
#else
#define BEFT_CLONES
#endif
#define BEFT_INLINE inline __attribute__((always_inline))
#define BEFT_INLINED __attribute__((always_inline))  // of a lambda, behind its parameters

namespace beft {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

template <typename To, typename From>
BEFT_INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

struct F32 {
  using Raw = float;
  static BEFT_INLINE float load(Raw x) { return x; }
  static BEFT_INLINE Raw store(float x) { return x; }
};

struct BF16 {
  using Raw = uint16_t;
  static BEFT_INLINE float load(Raw x) { return bits_as<float>(static_cast<uint32_t>(x) << 16); }
  // To nearest, ties to even.
  static BEFT_INLINE Raw store(float x) {
    const uint32_t bits = bits_as<uint32_t>(x);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return static_cast<Raw>(x != x ? 0x7fc0u : rounded);
  }
};

struct F16 {
  using Raw = uint16_t;
  // Exact for every half, subnormals included: the exponent is rebased by a float multiply.
  static BEFT_INLINE float load(Raw x) {
    const uint32_t wide = static_cast<uint32_t>(static_cast<int16_t>(x));  // sign on top
    const uint32_t body = (wide << 13) & 0x8fffe000u;
    const uint32_t special = (x & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;  // infinity and NaN
    const float scaled = bits_as<float>(body) * 5.192296858534828e+33f;    // 2^112
    return bits_as<float>(bits_as<uint32_t>(scaled) | special);
  }
  // To nearest, ties to even.
  static BEFT_INLINE Raw store(float x) {
    const uint32_t bits = bits_as<uint32_t>(x), sign = (bits >> 16) & 0x8000u;
    const uint32_t size = bits & 0x7fffffffu;
    // Beside 0.5 a float's last place is a half's smallest step: the addition rounds for us.
    const uint32_t small = bits_as<uint32_t>(bits_as<float>(size) + 0.5f) - 0x3f000000u;
    const uint32_t normal = (size - (112u << 23) + 0xfffu + ((size >> 13) & 1u)) >> 13;
    uint32_t out = size < 0x38800000u ? small : normal;  // below 2^-14 a half is subnormal
    out = size >= 0x477ff000u ? 0x7c00u : out;           // from 65520 on: infinity
    out = size > 0x7f800000u ? 0x7e00u : out;
    return static_cast<Raw>(out | sign);
  }
};

}  // namespace beft
