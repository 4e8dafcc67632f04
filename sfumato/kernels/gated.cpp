// The gated GELU, value * gelu(gate) of rows (value, gate), forward and backward, in float32 or bfloat16.
//
// Shazeer 2020. gelu(g) = g P(g) with P the normal distribution's function, by Abramowitz & Stegun's formula 7.1.26 for
// erf, off by at most 1.5e-7; its e^(-g^2 / 2) is the density's as well. Plain functions for ctypes, which check
// nothing: gated.py does. Letters: R rows, I channels of value and of gate; x (R, 2 I), out (R, I).

#include "mixed.h"

namespace {

using namespace sfumato;

// P(g), and the density times g.
INLINE void normal(vec g, vec& share, vec& slope) {
    const vec size = (g < 0.0f ? -g : g) * 0.70710678118654752f, power = exponential(-size * size);
    const vec t = 1.0f / (1.0f + 0.3275911f * size);
    vec p = 1.061405429f * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    const vec beyond = 0.5f * p * t * power;  // of the normal distribution, what lies farther out on this side
    share = g < 0.0f ? beyond : 1.0f - beyond;
    slope = g * power * 0.39894228040143268f;
}

template <class T>
void forward(const T* x, T* out, long rows, long inner, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (long row = 0; row < rows; ++row) {
        const T* from = x + row * 2 * inner;
        each_vector(0, inner, [&](long c, auto count) {
            const vec value = load(from + c, count);
            const vec gate = load(from + inner + c, count);
            vec share, slope;
            normal(gate, share, slope);
            store(out + row * inner + c, value * gate * share, count);
        });
    }
}

template <class T>
void backward(const T* grad, const T* x, T* of_x, long rows, long inner, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (long row = 0; row < rows; ++row) {
        const T* from = x + row * 2 * inner;
        T* into = of_x + row * 2 * inner;
        each_vector(0, inner, [&](long c, auto count) {
            const vec value = load(from + c, count);
            const vec gate = load(from + inner + c, count);
            const vec given = load(grad + row * inner + c, count);
            vec share, slope;
            normal(gate, share, slope);
            store(into + c, given * gate * share, count);
            store(into + inner + c, given * value * (share + slope), count);
        });
    }
}

}  // namespace

extern "C" {

// out = the first half of x times gelu of its second.
EXPORT void sfumato_gated(const void* x, void* out, long rows, long inner, int half, int threads) {
    if (half) forward(static_cast<const Half*>(x), static_cast<Half*>(out), rows, inner, threads);
    else forward(static_cast<const float*>(x), static_cast<float*>(out), rows, inner, threads);
}

// The gradient of x.
EXPORT void sfumato_gated_backward(
    const void* grad, const void* x, void* of_x, long rows, long inner, int half, int threads
) {
    const auto call = [&](auto type) {
        using T = decltype(type);
        const T *given = static_cast<const T*>(grad), *from = static_cast<const T*>(x);
        backward(given, from, static_cast<T*>(of_x), rows, inner, threads);
    };
    half ? call(Half{}) : call(0.0f);
}
}
