// Group norm of maps that lie channels last, with SiLU after it, forward and backward, in float32 or bfloat16.
//
// Wu & He 2018. Statistics are of each channel first, so that few channels a group take no longer than many, and of
// x less its first cell, so that no mean is too large for them; sums of 64 cells in float32, of more in double.
// Plain functions for ctypes, which check nothing: norm.py does. Where OpenMP is on, pictures are shared among threads.
// Letters: B pictures, P cells, C channels, G groups; x (B, P, C), shift (B, C), mean and rstd (B, G).

#include "mixed.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace {

using namespace sfumato;

constexpr long ROWS = 64;  // cells that are summed in float32

struct Shape {
    long batch, cells, channels, groups;
    long in_group() const { return channels / groups; }
};

// Channels of a picture: [begin, end).
struct Part {
    long picture, begin, end;
};

// Calls work(part) for all pictures; for a few pictures and many threads, some groups at a time.
template <class Work>
void for_parts(const Shape& shape, int threads, Work work) {
    const long most = std::max(1L, std::min(shape.groups, (threads + shape.batch - 1) / shape.batch));
    const long count = shape.batch * most;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && count > 1)
    for (long index = 0; index < count; ++index) {
        const long picture = index / most, part = index % most, size = shape.in_group();
        work(Part{picture, part * shape.groups / most * size, (part + 1) * shape.groups / most * size});
    }
}

// What each channel's numbers become: normalised = x * factor + offset, then * weight + bias.
struct Channels {
    std::vector<float> factor, offset, weight, bias;
    explicit Channels(long count) : factor(count), offset(count), weight(count), bias(count) {}
};

// Sums over the cells of a part: of x - base and of its square, each channel by itself.
template <class T>
void sums(const T* x, const Shape& shape, const Part& part, double* sum, double* square) {
    for (long start = 0; start < shape.cells; start += ROWS) {
        const long stop = std::min(shape.cells, start + ROWS);
        each_vector(part.begin, part.end, [&](long c, auto count) {
            const vec base = load(x + c, count);
            vec one{}, two{};
            for (long p = start; p < stop; ++p) {
                const vec d = load(x + p * shape.channels + c, count) - base;
                one += d;
                two += d * d;
            }
            add(sum + c - part.begin, one, count);
            add(square + c - part.begin, two, count);
        });
    }
}

template <class T>
void statistics(const T* x, const float* shift, const Shape& shape, const Part& part, float eps, float* mean, float* rstd) {
    const long width = part.end - part.begin, size = shape.in_group();
    std::vector<double> sum(width, 0.0), square(width, 0.0);
    sums(x, shape, part, sum.data(), square.data());
    for (long first = 0; first < width; first += size) {
        double total = 0.0, apart = 0.0;
        for (long c = first; c < first + size; ++c) {
            sum[c] /= shape.cells;
            const double off = sum[c] * sum[c];
            square[c] = std::max(0.0, square[c] / shape.cells - off);
            sum[c] += number(x[part.begin + c]) + (shift ? shift[part.begin + c] : 0.0f);
            total += sum[c];
        }
        total /= size;
        for (long c = first; c < first + size; ++c) {
            apart += square[c] + (sum[c] - total) * (sum[c] - total);
        }
        const long group = (part.begin + first) / size;
        mean[group] = static_cast<float>(total);
        rstd[group] = static_cast<float>(1.0 / std::sqrt(apart / size + eps));
    }
}

Channels channels_of(
    const float* weight, const float* bias, const float* shift, const Shape& shape, const Part& part, const float* mean,
    const float* rstd
) {
    Channels found(part.end - part.begin);
    for (long c = part.begin; c < part.end; ++c) {
        const long group = c / shape.in_group(), place = c - part.begin;
        found.factor[place] = rstd[group];
        found.offset[place] = ((shift ? shift[c] : 0.0f) - mean[group]) * rstd[group];
        found.weight[place] = weight[c];
        found.bias[place] = bias[c];
    }
    return found;
}

template <class T, bool SILU>
void forward(
    const T* x, T* y, const float* weight, const float* bias, const float* shift, float* mean, float* rstd,
    const Shape& shape, float eps, int threads
) {
    for_parts(shape, threads, [&](const Part& part) {
        const T* from = x + part.picture * shape.cells * shape.channels;
        T* into = y + part.picture * shape.cells * shape.channels;
        const float* more = shift ? shift + part.picture * shape.channels : nullptr;
        float *means = mean + part.picture * shape.groups, *rstds = rstd + part.picture * shape.groups;
        statistics(from, more, shape, part, eps, means, rstds);
        Channels of = channels_of(weight, bias, more, shape, part, means, rstds);
        for (size_t c = 0; c < of.factor.size(); ++c) {  // one multiplication for both
            of.factor[c] *= of.weight[c];
            of.offset[c] = of.offset[c] * of.weight[c] + of.bias[c];
        }
        for (long p = 0; p < shape.cells; ++p) {
            each_vector(part.begin, part.end, [&](long c, auto count) {
                const long place = c - part.begin, at = p * shape.channels + c;
                vec z = load(from + at, count) * load(&of.factor[place], count) + load(&of.offset[place], count);
                if (SILU) z = z / (1.0f + exponential(-z));
                store(into + at, z, count);
            });
        }
    });
}

// The gradient of z = normalised * weight + bias, of that of what came of it.
template <bool SILU>
inline vec through(vec grad, vec z) {
    if (!SILU) return grad;
    const vec s = 1.0f / (1.0f + exponential(-z));
    return grad * s * (1.0f + z * (1.0f - s));
}

template <class T, bool SILU>
void backward(
    const T* grad, const T* x, T* grad_x, const float* weight, const float* bias, const float* shift, const float* mean,
    const float* rstd, float* of_weight, float* of_bias, float* of_shift, const Shape& shape, int threads
) {
    for_parts(shape, threads, [&](const Part& part) {
        const long whole = part.picture * shape.cells * shape.channels, width = part.end - part.begin;
        const T *from = x + whole, *given = grad + whole;
        T* into = grad_x + whole;
        const float* more = shift ? shift + part.picture * shape.channels : nullptr;
        const float* rstds = rstd + part.picture * shape.groups;
        const Channels of = channels_of(weight, bias, more, shape, part, mean + part.picture * shape.groups, rstds);
        std::vector<double> dz(width, 0.0), dz_n(width, 0.0), n(width, 0.0);
        for (long start = 0; start < shape.cells; start += ROWS) {
            const long stop = std::min(shape.cells, start + ROWS);
            each_vector(part.begin, part.end, [&](long c, auto count) {
                const long place = c - part.begin;
                const vec factor = load(&of.factor[place], count), offset = load(&of.offset[place], count);
                const vec scale = load(&of.weight[place], count), beyond = load(&of.bias[place], count);
                vec one{}, two{}, three{};
                for (long p = start; p < stop; ++p) {
                    const vec normal = load(from + p * shape.channels + c, count) * factor + offset;
                    const vec d = through<SILU>(load(given + p * shape.channels + c, count), normal * scale + beyond);
                    one += d;
                    two += d * normal;
                    three += normal;
                }
                add(&dz[place], one, count);
                add(&dz_n[place], two, count);
                add(&n[place], three, count);
            });
        }
        const long size = shape.in_group();
        std::vector<float> a(width), b(width), e(width);
        for (long first = 0; first < width; first += size) {
            double sum = 0.0, sum_n = 0.0;
            for (long c = first; c < first + size; ++c) {
                sum += of.weight[c] * dz[c];
                sum_n += of.weight[c] * dz_n[c];
            }
            const double root = rstds[(part.begin + first) / size], each = root / (double(size) * shape.cells);
            for (long c = first; c < first + size; ++c) {
                const long at = part.picture * shape.channels + part.begin + c;
                a[c] = static_cast<float>(root * of.weight[c]);
                b[c] = static_cast<float>(each * sum_n);
                e[c] = static_cast<float>(each * sum);
                of_weight[at] = static_cast<float>(dz_n[c]);
                of_bias[at] = static_cast<float>(dz[c]);
                if (of_shift) {
                    of_shift[at] = static_cast<float>(
                        root * of.weight[c] * dz[c] - each * (sum * shape.cells + sum_n * n[c])
                    );
                }
            }
        }
        for (long p = 0; p < shape.cells; ++p) {
            each_vector(part.begin, part.end, [&](long c, auto count) {
                const long place = c - part.begin, at = p * shape.channels + c;
                const vec normal =
                    load(from + at, count) * load(&of.factor[place], count) + load(&of.offset[place], count);
                const vec z = normal * load(&of.weight[place], count) + load(&of.bias[place], count);
                const vec d = through<SILU>(load(given + at, count), z);
                store(into + at, d * load(&a[place], count) - normal * load(&b[place], count) - load(&e[place], count), count);
            });
        }
    });
}

}  // namespace

extern "C" {

// y = norm(x + shift) * weight + bias, with SiLU where `silu`; mean and rstd are written. `half`: x, y are bfloat16.
EXPORT void sfumato_group_norm(
    const void* x, void* y, const float* weight, const float* bias, const float* shift, float* mean, float* rstd,
    long batch, long cells, long channels, long groups, float eps, int silu, int half, int threads
) {
    const Shape shape{batch, cells, channels, groups};
    const auto call = [&](auto type) {
        using T = decltype(type);
        const auto work = silu ? forward<T, true> : forward<T, false>;
        work(static_cast<const T*>(x), static_cast<T*>(y), weight, bias, shift, mean, rstd, shape, eps, threads);
    };
    half ? call(Half{}) : call(0.0f);
}

// The gradients of x, and for each picture (B, C) of weight, bias and, where it is not null, of shift.
EXPORT void sfumato_group_norm_backward(
    const void* grad, const void* x, void* grad_x, const float* weight, const float* bias, const float* shift,
    const float* mean, const float* rstd, float* of_weight, float* of_bias, float* of_shift, long batch, long cells,
    long channels, long groups, int silu, int half, int threads
) {
    const Shape shape{batch, cells, channels, groups};
    const auto call = [&](auto type) {
        using T = decltype(type);
        const auto work = silu ? backward<T, true> : backward<T, false>;
        work(
            static_cast<const T*>(grad), static_cast<const T*>(x), static_cast<T*>(grad_x), weight, bias, shift, mean,
            rstd, of_weight, of_bias, of_shift, shape, threads
        );
    };
    half ? call(Half{}) : call(0.0f);
}
}
