// Vectors of float32 as wide as the processor has them, and the small matrix product that all else here rests on.
// Written with the compilers' vector extensions, so that one source serves AVX-512, AVX2 and NEON.

#pragma once

#include <algorithm>
#include <cstring>

namespace sfumato {

#if defined(__AVX512F__)
constexpr int WIDTH = 16;   // numbers in a vector
constexpr int VECTORS = 4;  // of a strip: with MOST_ROWS rows of them, the registers are used and none is spilt
#elif defined(__AVX__)
constexpr int WIDTH = 8;
constexpr int VECTORS = 2;
#else
constexpr int WIDTH = 4;
constexpr int VECTORS = 4;
#endif
constexpr long UNIT = 16;                 // channels are worked on in multiples of so many
constexpr long STRIP = WIDTH * VECTORS;   // columns of a product that are computed at a time, at most
constexpr long MOST_ROWS = 6;             // rows of it

typedef float vec __attribute__((vector_size(WIDTH * sizeof(float))));
typedef int lanes __attribute__((vector_size(WIDTH * sizeof(int))));

static inline vec load(const float* from) {
    vec v;
    memcpy(&v, from, sizeof v);
    return v;
}

static inline void store(float* to, vec v) { memcpy(to, &v, sizeof v); }

// The first `count` numbers, 0 for the rest.
static inline vec load_some(const float* from, long count) {
    if (count >= WIDTH) return load(from);
    vec v = {};
    memcpy(&v, from, count * sizeof(float));
    return v;
}

static inline void store_some(float* to, vec v, long count) {
    if (count >= WIDTH) store(to, v);
    else memcpy(to, &v, count * sizeof(float));
}

static inline long up(long size, long unit) { return (size + unit - 1) / unit * unit; }

// c (ROWS, NV vectors) = the sum over k of a[row * row_step + k * k_step] b[k * b_step ...], added to c if `more`.
template <int ROWS, int NV>
static inline void product(long depth, const float* a, long row_step, long k_step, const float* b, long b_step, float* c,
                           long c_step, bool more) {
    vec sum[ROWS][NV];
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
        for (int j = 0; j < NV; j++) sum[i][j] = more ? load(c + i * c_step + j * WIDTH) : vec{};
    for (long k = 0; k < depth; k++) {
        vec row[NV];
#pragma GCC unroll 4
        for (int j = 0; j < NV; j++) row[j] = load(b + j * WIDTH);
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++) {
            const float number = a[i * row_step];
#pragma GCC unroll 4
            for (int j = 0; j < NV; j++) sum[i][j] += number * row[j];
        }
        a += k_step;
        b += b_step;
    }
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
        for (int j = 0; j < NV; j++) store(c + i * c_step + j * WIDTH, sum[i][j]);
}

template <int ROWS>
static void product_of(long vectors, long depth, const float* a, long row_step, long k_step, const float* b, long b_step,
                       float* c, long c_step, bool more) {
    switch (vectors) {
        case 1: return product<ROWS, 1>(depth, a, row_step, k_step, b, b_step, c, c_step, more);
        case 2: return product<ROWS, 2>(depth, a, row_step, k_step, b, b_step, c, c_step, more);
        case 3: return product<ROWS, 3>(depth, a, row_step, k_step, b, b_step, c, c_step, more);
        default: return product<ROWS, 4>(depth, a, row_step, k_step, b, b_step, c, c_step, more);
    }
}

// As `product`, of any number of rows and of `columns`, a multiple of WIDTH and at most STRIP.
static void products(long rows, long columns, long depth, const float* a, long row_step, long k_step, const float* b,
                     long b_step, float* c, long c_step, bool more = false) {
    for (long blocks = (rows + MOST_ROWS - 1) / MOST_ROWS; blocks > 0; blocks--) {
        const long now = (rows + blocks - 1) / blocks, vectors = columns / WIDTH;
        switch (now) {
            case 1: product_of<1>(vectors, depth, a, row_step, k_step, b, b_step, c, c_step, more); break;
            case 2: product_of<2>(vectors, depth, a, row_step, k_step, b, b_step, c, c_step, more); break;
            case 3: product_of<3>(vectors, depth, a, row_step, k_step, b, b_step, c, c_step, more); break;
            case 4: product_of<4>(vectors, depth, a, row_step, k_step, b, b_step, c, c_step, more); break;
            case 5: product_of<5>(vectors, depth, a, row_step, k_step, b, b_step, c, c_step, more); break;
            default: product_of<6>(vectors, depth, a, row_step, k_step, b, b_step, c, c_step, more);
        }
        a += now * row_step;
        c += now * c_step;
        rows -= now;
    }
}

// Two rows of a square, every other run of STEP lanes exchanged: log2(WIDTH) such rounds transpose it.
template <int STEP>
static inline void exchange(vec& a, vec& b) {
    lanes first, second;
    for (int i = 0; i < WIDTH; i++) {
        first[i] = i & STEP ? WIDTH + i - STEP : i;
        second[i] = i & STEP ? WIDTH + i : i + STEP;
    }
#if defined(__clang__)
    vec x, y;
    for (int i = 0; i < WIDTH; i++) {
        x[i] = first[i] < WIDTH ? a[first[i]] : b[first[i] - WIDTH];
        y[i] = second[i] < WIDTH ? a[second[i]] : b[second[i] - WIDTH];
    }
#else
    const vec x = __builtin_shuffle(a, b, first), y = __builtin_shuffle(a, b, second);
#endif
    a = x;
    b = y;
}

template <int STEP>
static inline void transpose_from(vec (&square)[WIDTH]) {
#pragma GCC unroll 16
    for (int i = 0; i < WIDTH; i++)
        if (!(i & STEP)) exchange<STEP>(square[i], square[i + STEP]);
    if constexpr (2 * STEP < WIDTH) transpose_from<2 * STEP>(square);
}

static inline void transpose(vec (&square)[WIDTH]) { transpose_from<1>(square); }

}  // namespace sfumato
