// Matrix products of float32: what a linear layer computes, and its gradients.
//
// c (rows, columns) = the sum over k of a (row, k) b (k, column), with b (or b transposed) packed in pieces that fit the
// cache; each is used for all rows. Every number is summed in the same order, whatever the number of threads.

#include <omp.h>

#include "vectors.h"

namespace {

using namespace sfumato;

constexpr long WIDE = 64;    // columns of a panel at most
constexpr long DEEP = 384;   // of k, that are packed at a time
constexpr long CHUNK = 48;   // rows that are in work at a time
constexpr long SCRATCH = DEEP * WIDE + CHUNK * WIDE;

// b's rows [begin, begin + depth) and columns [first, first + width) as strips (depth, strip), 0 beyond its columns.
void pack(const float* b, long step, long begin, long depth, long first, long width, long columns, float* to) {
    const long strip = std::min(width, STRIP);
    for (long s = 0; s < width; s += strip)
        for (long k = 0; k < depth; k++)
            for (long j = 0; j < strip; j += WIDTH) {
                const long column = first + s + j;
                store(to + s * depth + k * strip + j,
                      load_some(b + (begin + k) * step + column, std::max(0l, columns - column)));
            }
}

// The same of b transposed: its rows are columns here.
void pack_transposed(const float* b, long step, long begin, long depth, long first, long width, long columns,
                     float* to) {
    const long strip = std::min(width, STRIP);
    for (long s = 0; s < width; s += WIDTH) {
        float* at = to + s / strip * strip * depth + s % strip;
        for (long k = 0; k < depth; k += WIDTH) {
            const long count = std::min<long>(WIDTH, depth - k);
            vec square[WIDTH];
            for (long i = 0; i < WIDTH; i++)
                square[i] = first + s + i < columns ? load_some(b + (first + s + i) * step + begin + k, count) : vec{};
            transpose(square);
            for (long i = 0; i < count; i++) store(at + (k + i) * strip, square[i]);
        }
    }
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// Numbers of the memory to work in.
EXPORT long sfumato_linear_work(long threads) { return threads * SCRATCH; }

// c (rows, columns) = a b + bias. a's number (row, k) is a[row * row_step + k * k_step]; b's number (k, column) is
// b[k * b_step + column], or where `transposed` b[column * b_step + k].
EXPORT void sfumato_linear_product(const float* a, const float* b, const float* bias, float* c, float* work, long rows,
                                   long columns, long depth, long row_step, long k_step, long b_step, long transposed,
                                   long threads) {
    const long units = up(columns, UNIT) / UNIT, panels = (units * UNIT + WIDE - 1) / WIDE;
    const long chunks = (rows + CHUNK - 1) / CHUNK;
    const long parts = std::max(1l, std::min(chunks, threads > 1 ? (2 * threads + panels - 1) / panels : 1));
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
    for (long task = 0; task < panels * parts; task++) {
        const long panel = task % panels, part = task / panels;
        const long first = units * panel / panels * UNIT, width = units * (panel + 1) / panels * UNIT - first;
        const long from = chunks * part / parts * CHUNK, until = std::min(rows, chunks * (part + 1) / parts * CHUNK);
        const long strip = std::min(width, STRIP), there = std::min(width, columns - first);
        float* packed = work + omp_get_thread_num() * SCRATCH;
        float* aside = packed + DEEP * WIDE;
        for (long k = 0; k < depth; k += DEEP) {
            const long deep = std::min(DEEP, depth - k);
            if (transposed) pack_transposed(b, b_step, k, deep, first, width, columns, packed);
            else pack(b, b_step, k, deep, first, width, columns, packed);
            for (long row = from; row < until; row += CHUNK) {
                const long count = std::min(CHUNK, until - row);
                float* out = c + row * columns + first;
                const bool direct = there == width;
                float* to = direct ? out : aside;
                const long step = direct ? columns : WIDE;
                for (long i = 0; i < count; i++) {
                    if (k == 0 && bias) memcpy(to + i * step, bias + first, there * sizeof(float));
                    else if (k > 0 && !direct) memcpy(to + i * step, out + i * columns, there * sizeof(float));
                }
                for (long s = 0; s < width; s += strip)
                    products(count, strip, deep, a + row * row_step + k * k_step, row_step, k_step, packed + s * deep,
                             strip, to + s, step, k > 0 || bias);
                if (!direct)
                    for (long i = 0; i < count; i++) memcpy(out + i * columns, to + i * step, there * sizeof(float));
            }
        }
    }
}
