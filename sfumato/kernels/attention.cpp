// Attention with few keys and narrow heads, softmax(q k^T / sqrt(d)) v, forward and backward, in float32 or bfloat16.
//
// Vaswani et al. 2017, eq. 1; the backward pass as in Dao et al. 2022, algorithm 4, with all keys at once. All keys and
// values of a head lie in the cache, so attention.py asks for few. Plain functions for ctypes, which check nothing.
// Letters: B batch, n heads, L queries, M keys, d channels a head; q (B, L, n d), k and v (B, M, n d), sums (B, n, L).

#include "mixed.h"

#include <cmath>
#include <vector>

namespace {

using namespace sfumato;

constexpr long ROWS = 48;  // queries at a time

struct Shape {
    long batch, heads, queries, keys, size;
    long step() const { return heads * size; }
};

// Rows of numbers, each padded with zeros to whole vectors.
struct Matrix {
    long step;
    std::vector<float> numbers;
    Matrix(long rows, long columns) : step(up(columns, WIDTH)), numbers(rows * step, 0.0f) {}
    float* row(long index) { return numbers.data() + index * step; }
    const float* row(long index) const { return numbers.data() + index * step; }
};

// c (rows, a multiple of WIDTH columns) = the sum over k of a[row * row_step + k * k_step] b[k][...]; see `products`.
void multiply(long rows, long depth, const float* a, long row_step, long k_step, const Matrix& b, Matrix& c, bool more) {
    const long vectors = c.step / WIDTH, strips = (vectors + VECTORS - 1) / VECTORS;
    for (long strip = 0; strip < strips; ++strip) {
        const long begin = strip * vectors / strips * WIDTH, end = (strip + 1) * vectors / strips * WIDTH;
        products(rows, end - begin, depth, a, row_step, k_step, b.row(0) + begin, b.step, c.row(0) + begin, c.step, more);
    }
}

// One head's rows, times a factor.
template <class T>
void read(const T* from, long rows, long step, long size, float factor, Matrix& into) {
    for (long row = 0; row < rows; ++row) {
        each_vector(0, size, [&](long c, auto count) {
            store(into.row(row) + c, load(from + row * step + c, count) * factor, All{});
        });
    }
}

template <class T>
void write(const Matrix& from, long rows, long step, long size, float factor, T* into) {
    for (long row = 0; row < rows; ++row) {
        each_vector(0, size, [&](long c, auto count) {
            store(into + row * step + c, load(from.row(row) + c, All{}) * factor, count);
        });
    }
}

void turn(const Matrix& from, long rows, long columns, Matrix& into) {
    for (long row = 0; row < rows; ++row) {
        for (long column = 0; column < columns; ++column) into.row(column)[row] = from.row(row)[column];
    }
}

// Scores -> e^(score - the largest); returns their sum, and gives log(sum) + largest. Beyond the keys stands 0 after it.
float powers(float* scores, long keys, float* log_sum) {
    vec most = all(scores[0]);
    long at = 0;
    for (; at + WIDTH <= keys; at += WIDTH) {
        const vec score = load(scores + at, All{});
        most = score > most ? score : most;
    }
    float top = largest(most);
    for (long key = at; key < keys; ++key) top = scores[key] > top ? scores[key] : top;
    vec sum{};
    for (at = 0; at + WIDTH <= keys; at += WIDTH) {
        const vec power = exponential(load(scores + at, All{}) - top);
        sum += power;
        store(scores + at, power, All{});
    }
    if (at < keys) {
        vec power{};
        std::memcpy(&power, scores + at, 4 * (keys - at));
        power = exponential(power - top);
        for (long lane = keys - at; lane < WIDTH; ++lane) power[lane] = 0.0f;
        sum += power;
        store(scores + at, power, All{});
    }
    const float whole = total(sum);
    if (log_sum) *log_sum = std::log(whole) + top;
    return whole;
}

template <class T>
void forward(const T* q, const T* k, const T* v, T* out, float* log_sums, const Shape& shape, int threads) {
    const long size = shape.size, keys = shape.keys, step = shape.step(), rows = std::min(ROWS, shape.queries);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Matrix key(keys, size), turned(size, keys), value(keys, size), query(rows, size), score(rows, keys);
        Matrix found(rows, size);
#pragma omp for schedule(static)
        for (long index = 0; index < shape.batch * shape.heads; ++index) {
            const long batch = index / shape.heads, head = index % shape.heads;
            const long first = batch * shape.queries * step + head * size, of_keys = batch * keys * step + head * size;
            read(k + of_keys, keys, step, size, 1.0f, key);
            turn(key, keys, size, turned);
            read(v + of_keys, keys, step, size, 1.0f, value);
            for (long start = 0; start < shape.queries; start += rows) {
                const long count = std::min(rows, shape.queries - start);
                read(q + first + start * step, count, step, size, 1.0f / std::sqrt(float(size)), query);
                multiply(count, size, query.row(0), query.step, 1, turned, score, false);
                float whole[ROWS];
                for (long row = 0; row < count; ++row) {
                    float* log_sum = log_sums ? log_sums + index * shape.queries + start + row : nullptr;
                    whole[row] = powers(score.row(row), keys, log_sum);
                }
                multiply(count, keys, score.row(0), score.step, 1, value, found, false);
                for (long row = 0; row < count; ++row) {
                    const float factor = 1.0f / whole[row];
                    for (long c = 0; c < found.step; c += WIDTH) {
                        store(found.row(row) + c, load(found.row(row) + c, All{}) * factor, All{});
                    }
                }
                write(found, count, step, size, 1.0f, out + first + start * step);
            }
        }
    }
}

template <class T>
void backward(
    const T* grad, const T* q, const T* k, const T* v, const T* out, const float* log_sums, T* of_q, T* of_k, T* of_v,
    const Shape& shape, int threads
) {
    const long size = shape.size, keys = shape.keys, step = shape.step(), rows = std::min(ROWS, shape.queries);
    const float factor = 1.0f / std::sqrt(float(size));
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Matrix key(keys, size), key_turned(size, keys), value(keys, size), value_turned(size, keys);
        Matrix query(rows, size), given(rows, size), found(rows, size), power(rows, keys), score(rows, keys);
        Matrix back_q(rows, size), back_k(keys, size), back_v(keys, size);
#pragma omp for schedule(static)
        for (long index = 0; index < shape.batch * shape.heads; ++index) {
            const long batch = index / shape.heads, head = index % shape.heads;
            const long first = batch * shape.queries * step + head * size, of_keys = batch * keys * step + head * size;
            read(k + of_keys, keys, step, size, 1.0f, key);
            turn(key, keys, size, key_turned);
            read(v + of_keys, keys, step, size, 1.0f, value);
            turn(value, keys, size, value_turned);
            for (long start = 0; start < shape.queries; start += rows) {
                const long count = std::min(rows, shape.queries - start), at = first + start * step;
                const bool more = start > 0;
                read(q + at, count, step, size, factor, query);
                read(grad + at, count, step, size, 1.0f, given);
                read(out + at, count, step, size, 1.0f, found);
                multiply(count, size, query.row(0), query.step, 1, key_turned, power, false);
                multiply(count, size, given.row(0), given.step, 1, value_turned, score, false);
                for (long row = 0; row < count; ++row) {
                    vec sum{};
                    for (long c = 0; c < given.step; c += WIDTH) {
                        sum += load(given.row(row) + c, All{}) * load(found.row(row) + c, All{});
                    }
                    const float along = total(sum), log_sum = log_sums[index * shape.queries + start + row];
                    for (long c = 0; c < power.step; c += WIDTH) {  // what is beyond the keys meets zeros only
                        const vec p = exponential(load(power.row(row) + c, All{}) - log_sum);
                        store(power.row(row) + c, p, All{});
                        store(score.row(row) + c, p * (load(score.row(row) + c, All{}) - along), All{});
                    }
                }
                multiply(keys, count, power.row(0), 1, power.step, given, back_v, more);
                multiply(keys, count, score.row(0), 1, score.step, query, back_k, more);
                multiply(count, keys, score.row(0), score.step, 1, key, back_q, false);
                write(back_q, count, step, size, factor, of_q + at);
            }
            write(back_k, keys, step, size, 1.0f, of_k + of_keys);
            write(back_v, keys, step, size, 1.0f, of_v + of_keys);
        }
    }
}

}  // namespace

extern "C" {

// out = softmax(q k^T / sqrt(d)) v; log_sums, unless it is null, becomes the logarithms of the softmax's sums.
EXPORT void sfumato_attention(
    const void* q, const void* k, const void* v, void* out, float* log_sums, long batch, long heads, long queries,
    long keys, long size, int half, int threads
) {
    const Shape shape{batch, heads, queries, keys, size};
    const auto call = [&](auto type) {
        using T = decltype(type);
        const T *from = static_cast<const T*>(q), *to = static_cast<const T*>(k), *of = static_cast<const T*>(v);
        forward(from, to, of, static_cast<T*>(out), log_sums, shape, threads);
    };
    half ? call(Half{}) : call(0.0f);
}

// The gradients of q, k and v.
EXPORT void sfumato_attention_backward(
    const void* grad, const void* q, const void* k, const void* v, const void* out, const float* log_sums, void* of_q,
    void* of_k, void* of_v, long batch, long heads, long queries, long keys, long size, int half, int threads
) {
    const Shape shape{batch, heads, queries, keys, size};
    const auto call = [&](auto type) {
        using T = decltype(type);
        const auto given = [](const void* from) { return static_cast<const T*>(from); };
        const auto made = [](void* into) { return static_cast<T*>(into); };
        backward(
            given(grad), given(q), given(k), given(v), given(out), log_sums, made(of_q), made(of_k), made(of_v), shape,
            threads
        );
    };
    half ? call(Half{}) : call(0.0f);
}
}
