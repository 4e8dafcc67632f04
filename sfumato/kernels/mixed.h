// Vectors of floats loaded from and stored as float32 or bfloat16, also the first few lanes alone; e^x of them.
//
// Everything is computed in float32; what is read and written may be shorter.

#pragma once

#include <cstdint>
#include <cstring>

#include "vectors.h"

#define INLINE inline __attribute__((always_inline))
#define EXPORT __attribute__((visibility("default")))

namespace sfumato {

typedef uint32_t Words __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t Shorts __attribute__((vector_size(2 * WIDTH)));

// A bfloat16: the upper half of a float32.
struct Half {
    uint16_t bits;
};

// How many lanes are meant: all, known when it is compiled, or the first few.
struct All {
    constexpr operator long() const { return WIDTH; }
};
struct Some {
    long count;
    operator long() const { return count; }
};

// Calls work(c, count) for c from begin to end in steps of a vector; the last one may be shorter.
template <class Work>
INLINE void each_vector(long begin, long end, const Work& work) {
    long c = begin;
    for (; c + WIDTH <= end; c += WIDTH) work(c, All{});
    if (c < end) work(c, Some{end - c});
}

template <class To, class From>
INLINE To same_bits(From value) {
    static_assert(sizeof(To) == sizeof(From), "other size");
    To found;
    std::memcpy(&found, &value, sizeof found);
    return found;
}

INLINE vec all(float value) { return vec{} + value; }

INLINE vec widened(Shorts bits) { return same_bits<vec>(__builtin_convertvector(bits, Words) << 16); }

// To the nearest, ties to even; NaN stays one.
INLINE Shorts narrowed(vec value) {
    const Words bits = same_bits<Words>(value);
    const Words rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    const Words found = value != value ? Words{} + 0x7FC0 : rounded;
    return __builtin_convertvector(found, Shorts);
}

// Copies some numbers of `size` bytes; for a few at the end of a row in pieces of 2^n, each known when it is compiled.
INLINE void copy(char* into, const char* from, long size, All) { std::memcpy(into, from, WIDTH * size); }

INLINE void copy(char* into, const char* from, long size, Some some) {
#pragma GCC unroll 4
    for (long piece = WIDTH / 2; piece > 0; piece /= 2) {
        if (some.count & piece) {
            std::memcpy(into, from, piece * size);
            into += piece * size;
            from += piece * size;
        }
    }
}

template <class Count>
INLINE vec load(const float* from, Count count) {
    vec found{};
    copy(reinterpret_cast<char*>(&found), reinterpret_cast<const char*>(from), 4, count);
    return found;
}

template <class Count>
INLINE vec load(const Half* from, Count count) {
    Shorts found{};
    copy(reinterpret_cast<char*>(&found), reinterpret_cast<const char*>(from), 2, count);
    return widened(found);
}

template <class Count>
INLINE void store(float* into, vec value, Count count) {
    copy(reinterpret_cast<char*>(into), reinterpret_cast<const char*>(&value), 4, count);
}

template <class Count>
INLINE void store(Half* into, vec value, Count count) {
    const Shorts found = narrowed(value);
    copy(reinterpret_cast<char*>(into), reinterpret_cast<const char*>(&found), 2, count);
}

template <class Count>
INLINE void add(double* into, vec value, Count count) {
    for (long lane = 0; lane < static_cast<long>(count); ++lane) into[lane] += value[lane];
}

INLINE float number(float value) { return value; }
INLINE float number(Half value) { return same_bits<float>(static_cast<uint32_t>(value.bits) << 16); }

// All lanes together, four at a time first.
template <class Join>
INLINE float joined(vec value, Join join) {
    typedef float Four __attribute__((vector_size(16)));
    Four quarters[WIDTH / 4];
    std::memcpy(quarters, &value, sizeof value);
#pragma GCC unroll 4
    for (int part = 1; part < WIDTH / 4; ++part) quarters[0] = join(quarters[0], quarters[part]);
    return join(join(quarters[0][0], quarters[0][1]), join(quarters[0][2], quarters[0][3]));
}

INLINE float total(vec value) {
    return joined(value, [](auto a, auto b) { return a + b; });
}

INLINE float largest(vec value) {
    return joined(value, [](auto a, auto b) { return a > b ? a : b; });
}

// e^x to about 2 units in the last place, between 2^-126 and 2^127: Cephes' expf (Moshier), without its branches.
INLINE vec exponential(vec x) {
    x = x < -87.3f ? all(-87.3f) : x;
    x = x > 88.0f ? all(88.0f) : x;
    const vec magic = all(12582912.0f);  // 1.5 * 2^23: what is added to it is rounded to a whole number
    const vec sum = x * 1.44269504088896341f + magic;
    const vec n = sum - magic;
    const vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const Words power = (same_bits<Words>(sum) - 0x4B400000u + 127u) << 23;
    return p * same_bits<vec>(power);
}

}  // namespace sfumato
