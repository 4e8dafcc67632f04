// 3 x 3 convolutions of channels-last float32 maps by Winograd's minimal filtering F(M x M, 3 x 3), with gradients.
//
// Winograd 1980, Lavin & Gray 2016; a cell of zeros lies around each map. Letters: N = M + 2, C channels in, O channels
// out, T tiles of M x M results, K the channels that are summed over: C for results, O for the gradient of x.
//
// Planes: N * N matrices one after the other, each a line longer than it is, as equal places of the planes would
// otherwise share a set of the cache. Panels: up to 64 columns of transformed weights, packed (N * N, strips, K, strip).

#include <omp.h>

#include "vectors.h"

namespace {

using namespace sfumato;

constexpr long LINE = 16;                  // numbers in a line of the cache
constexpr long CHUNK = 48;                 // tiles whose products are in work at a time
constexpr long PANEL = 64 / UNIT;          // units of a panel at most
constexpr long OUT_ROWS = 48;              // output channels whose weights' gradients are in work at a time

long plane(long rows, long columns) { return up(rows * columns, LINE) + LINE; }

template <int M>
struct Filter;

template <>
struct Filter<2> {
    static constexpr int N = 4;
    template <class V> static void tile(const V* d, V* t, int s) {  // B^T d
        t[0] = d[0] - d[2 * s], t[s] = d[s] + d[2 * s], t[2 * s] = d[2 * s] - d[s], t[3 * s] = d[s] - d[3 * s];
    }
    template <class V> static void tile_back(const V* t, V* d, int s) {  // B t
        d[0] = t[0], d[s] = t[s] - t[2 * s] + t[3 * s], d[2 * s] = t[s] + t[2 * s] - t[0], d[3 * s] = -t[3 * s];
    }
    template <class V> static void result(const V* p, V* y, int s) {  // A^T p
        y[0] = p[0] + p[s] + p[2 * s], y[s] = p[s] - p[2 * s] - p[3 * s];
    }
    template <class V> static void result_back(const V* y, V* p, int s) {  // A y
        p[0] = y[0], p[s] = y[0] + y[s], p[2 * s] = y[0] - y[s], p[3 * s] = -y[s];
    }
    template <class V> static void filter(const V* g, V* u, int s) {  // G g
        const V even = (g[0] + g[2 * s]) * 0.5f, odd = g[s] * 0.5f;
        u[0] = g[0], u[s] = even + odd, u[2 * s] = even - odd, u[3 * s] = g[2 * s];
    }
    template <class V> static void filter_back(const V* u, V* g, int s) {  // G^T u
        const V even = (u[s] + u[2 * s]) * 0.5f;
        g[0] = u[0] + even, g[s] = (u[s] - u[2 * s]) * 0.5f, g[2 * s] = even + u[3 * s];
    }
};

template <>
struct Filter<4> {
    static constexpr int N = 6;
    template <class V> static void tile(const V* d, V* t, int s) {
        const V a = d[4 * s] - 4.f * d[2 * s], b = d[3 * s] - 4.f * d[s];
        const V c = d[4 * s] - d[2 * s], e = 2.f * (d[3 * s] - d[s]);
        const V first = 4.f * d[0] - 5.f * d[2 * s] + d[4 * s], last = 4.f * d[s] - 5.f * d[3 * s] + d[5 * s];
        t[0] = first, t[s] = a + b, t[2 * s] = a - b, t[3 * s] = c + e, t[4 * s] = c - e, t[5 * s] = last;
    }
    template <class V> static void tile_back(const V* t, V* d, int s) {
        const V even = t[s] + t[2 * s], odd = t[s] - t[2 * s], wide = t[3 * s] + t[4 * s], far = t[3 * s] - t[4 * s];
        const V a = 4.f * t[0], b = 4.f * (t[5 * s] - odd) - 2.f * far, c = -5.f * t[0] - 4.f * even - wide;
        const V e = odd + 2.f * far - 5.f * t[5 * s], f = t[0] + even + wide, last = t[5 * s];
        d[0] = a, d[s] = b, d[2 * s] = c, d[3 * s] = e, d[4 * s] = f, d[5 * s] = last;
    }
    template <class V> static void result(const V* p, V* y, int s) {
        const V even = p[s] + p[2 * s], odd = p[s] - p[2 * s], wide = p[3 * s] + p[4 * s], far = p[3 * s] - p[4 * s];
        const V last = odd + 8.f * far + p[5 * s];
        y[0] = p[0] + even + wide, y[s] = odd + 2.f * far, y[2 * s] = even + 4.f * wide, y[3 * s] = last;
    }
    template <class V> static void result_back(const V* y, V* p, int s) {
        const V even = y[0] + y[2 * s], odd = y[s] + y[3 * s], wide = y[0] + 4.f * y[2 * s];
        const V far = 2.f * y[s] + 8.f * y[3 * s], first = y[0], last = y[3 * s];
        p[0] = first, p[s] = even + odd, p[2 * s] = even - odd, p[3 * s] = wide + far, p[4 * s] = wide - far;
        p[5 * s] = last;
    }
    template <class V> static void filter(const V* g, V* u, int s) {
        const V even = (g[0] + g[2 * s]) * (-1.f / 6), odd = g[s] * (-1.f / 6);
        const V wide = g[0] * (1.f / 24) + g[2 * s] * (1.f / 6), far = g[s] * (1.f / 12);
        const V first = g[0] * 0.25f, last = g[2 * s];
        u[0] = first, u[s] = even + odd, u[2 * s] = even - odd, u[3 * s] = wide + far, u[4 * s] = wide - far;
        u[5 * s] = last;
    }
    template <class V> static void filter_back(const V* u, V* g, int s) {
        const V even = (u[s] + u[2 * s]) * (-1.f / 6), wide = u[3 * s] + u[4 * s];
        const V odd = (u[2 * s] - u[s]) * (1.f / 6) + (u[3 * s] - u[4 * s]) * (1.f / 12);
        const V first = 0.25f * u[0] + even + wide * (1.f / 24);
        g[0] = first, g[s] = odd, g[2 * s] = even + wide * (1.f / 6) + u[5 * s];
    }
};

// A map and its tiles, counted along rows, then columns of them, then pictures.
template <int M>
struct Grid {
    long batch, height, width;
    long rows() const { return (height + M - 1) / M; }
    long columns() const { return (width + M - 1) / M; }
    long tiles() const { return batch * rows() * columns(); }
};

// SIZE x SIZE cells of a map from (top, left) on: where each one's channels begin, and nothing beyond the edges.
template <int SIZE>
struct Cells {
    long at[SIZE * SIZE];
    bool inside[SIZE * SIZE];
    bool all = true;

    template <int M>
    Cells(const Grid<M>& grid, long tile, int border, long channels) {
        const long columns = grid.columns(), picture = tile / (grid.rows() * columns);
        const long left = tile % columns * M - border, top = tile / columns % grid.rows() * M - border;
        for (int i = 0; i < SIZE; i++)
            for (int j = 0; j < SIZE; j++) {
                const long y = top + i, x = left + j;
                const bool in = y >= 0 && y < grid.height && x >= 0 && x < grid.width;
                inside[i * SIZE + j] = in;
                at[i * SIZE + j] = in ? ((picture * grid.height + y) * grid.width + x) * channels : 0;
                all = all && in;
            }
    }
};

// Along columns, then rows of a square: of an (A, A) square a (B, B) one.
template <int A, int B, class F>
static inline void both(const vec* from, vec* to, F&& along) {
    vec half[B * A];
#pragma GCC unroll 8
    for (int j = 0; j < A; j++) along(from + j, half + j, A, A);
#pragma GCC unroll 8
    for (int i = 0; i < B; i++) {
        vec row[A], out[B];
        for (int j = 0; j < A; j++) row[j] = half[i * A + j];
        along(row, out, 1, 1);
        for (int j = 0; j < B; j++) to[i * B + j] = out[j];
    }
}

#define BOTH(A, B, FUNCTION, from, to) \
    both<A, B>(from, to, [](const vec* x, vec* y, int s, int) { Filter<M>::FUNCTION(x, y, s); })

// What lies in one tile, transformed, into its row of each plane; of x (a border of 1, B^T d B) or of a gradient of
// results (no border, A y A^T).
template <int M, bool OF_RESULTS>
void to_planes(const float* map, const Grid<M>& grid, long channels, long tile, float* to, long plane_size) {
    constexpr int N = M + 2, SIZE = OF_RESULTS ? M : N;
    const Cells<SIZE> cells(grid, tile, OF_RESULTS ? 0 : 1, channels);
    for (long c = 0; c < channels; c += WIDTH) {
        const long count = channels - c;
        vec from[SIZE * SIZE], out[N * N];
        if (cells.all && count >= WIDTH)
            for (int i = 0; i < SIZE * SIZE; i++) from[i] = load(map + cells.at[i] + c);
        else
            for (int i = 0; i < SIZE * SIZE; i++)
                from[i] = cells.inside[i] ? load_some(map + cells.at[i] + c, count) : vec{};
        if constexpr (OF_RESULTS) BOTH(M, N, result_back, from, out);
        else BOTH(N, N, tile, from, out);
        for (int i = 0; i < N * N; i++) store_some(to + i * plane_size + c, out[i], count);
    }
}

// From one tile's row of each plane into the map: results (A^T p A, with their bias) written, or gradients of tiles
// (B t B^T), which overlap, added.
template <int M, bool TO_X>
void from_planes(const float* from, long plane_size, long width, const float* bias, float* map, const Grid<M>& grid,
                 long channels, long first, long tile) {
    constexpr int N = M + 2, SIZE = TO_X ? N : M;
    const Cells<SIZE> cells(grid, tile, TO_X ? 1 : 0, channels);
    for (long c = 0; c < width && first + c < channels; c += WIDTH) {
        const long count = channels - first - c;
        vec in[N * N], out[SIZE * SIZE];
        for (int i = 0; i < N * N; i++) in[i] = load(from + i * plane_size + c);
        if constexpr (TO_X) BOTH(N, N, tile_back, in, out);
        else BOTH(N, M, result, in, out);
        const vec more = bias ? load_some(bias + first + c, count) : vec{};
        for (int i = 0; i < SIZE * SIZE; i++) {
            if (!cells.inside[i]) continue;
            float* to = map + cells.at[i] + first + c;
            if constexpr (TO_X) store_some(to, load_some(to, count) + out[i], count);
            else store_some(to, out[i] + more, count);
        }
    }
}

// Columns [first, first + width) of a product, a multiple of UNIT, and how they are packed.
struct Panel {
    long first, width;
    long strip() const { return std::min(width, STRIP); }
};

struct Panels {
    long units, count;
    explicit Panels(long columns) : units(up(columns, UNIT) / UNIT), count((units + PANEL - 1) / PANEL) {}
    Panel operator[](long i) const {
        const long begin = units * i / count, end = units * (i + 1) / count;
        return {begin * UNIT, (end - begin) * UNIT};
    }
    long widest() const { return (units + count - 1) / count * UNIT; }
    long columns() const { return units * UNIT; }
};

// A panel of the transformed weight (O, 3, 3, C) for results: columns are output channels, K is C.
template <int M>
void pack_for_results(const float* weight, long outs, long channels, Panel panel, float* to) {
    constexpr int N = M + 2;
    const long size = plane(channels, panel.width), strip = panel.strip();
    for (long o = 0; o < panel.width; o += WIDTH) {
        const long there = std::min<long>(WIDTH, outs - panel.first - o);
        float* column = to + o / strip * channels * strip + o % strip;
        for (long c = 0; c < channels; c += WIDTH) {
            const long count = std::min<long>(WIDTH, channels - c);
            vec block[9][WIDTH];
            for (int k = 0; k < 9; k++) {
                for (long i = 0; i < WIDTH; i++)
                    block[k][i] =
                        i < there ? load_some(weight + ((panel.first + o + i) * 9 + k) * channels + c, count) : vec{};
                transpose(block[k]);
            }
            for (long i = 0; i < count; i++) {
                vec filter[9], out[N * N];
                for (int k = 0; k < 9; k++) filter[k] = block[k][i];
                BOTH(3, N, filter, filter, out);
                for (int k = 0; k < N * N; k++) store(column + k * size + (c + i) * strip, out[k]);
            }
        }
    }
}

// The same for the gradient of x: columns are input channels, K is O.
template <int M>
void pack_for_x(const float* weight, long outs, long channels, Panel panel, float* to) {
    constexpr int N = M + 2;
    const long size = plane(outs, panel.width), strip = panel.strip();
    for (long o = 0; o < outs; o++)
        for (long c = 0; c < panel.width; c += WIDTH) {
            const long count = std::max<long>(0, channels - panel.first - c);
            vec filter[9], out[N * N];
            for (int k = 0; k < 9; k++) filter[k] = load_some(weight + (o * 9 + k) * channels + panel.first + c, count);
            BOTH(3, N, filter, filter, out);
            float* at = to + c / strip * outs * strip + o * strip + c % strip;
            for (int k = 0; k < N * N; k++) store(at + k * size, out[k]);
        }
}

// Tiles that are transformed at a time, of `numbers` numbers if it can be.
template <int M>
long band_of(long tiles, long depth, long numbers) {
    constexpr int N = M + 2;
    return std::min(tiles, std::max(CHUNK, numbers / (N * N * depth)));
}

template <int M>
long scratch(long depth, long columns) {
    constexpr int N = M + 2;
    const long width = Panels(columns).widest();
    return N * N * (plane(depth, width) + plane(CHUNK, width));
}

template <int M>
long gradient_scratch(long channels) {
    return (M + 2) * (M + 2) * plane(OUT_ROWS, up(channels, UNIT));
}

// Tiles begin to end, which lie in planes (tiles from `begin` on, K), times the weight, into the map, panel by panel.
template <int M, bool TO_X>
void multiply(const float* in, long in_plane, long begin, long end, const float* weight, const float* packed,
              const float* bias, float* map, const Grid<M>& grid, long depth, long columns, float* work, int threads) {
    constexpr int N = M + 2;
    const Panels panels(columns);
    const long each = scratch<M>(depth, columns), per_picture = grid.rows() * grid.columns();
    // where panels are few, tiles are shared out as well: whole pictures, where tiles of a picture are added up
    const long unit = TO_X ? per_picture : 1, low = begin / unit, high = (end + unit - 1) / unit;
    const long parts = std::max(1l, std::min(high - low, (threads + panels.count - 1) / panels.count));
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
    for (long task = 0; task < panels.count * parts; task++) {
        const long index = task % panels.count, part = task / panels.count;
        const Panel panel = panels[index];
        const long from = std::max(begin, (low + (high - low) * part / parts) * unit);
        const long until = std::min(end, (low + (high - low) * (part + 1) / parts) * unit);
        float* own = work + omp_get_thread_num() * each;
        const long size = plane(depth, panel.width), strip = panel.strip();
        const float* ready = packed;
        if (packed) {
            for (long i = 0; i < index; i++) ready += N * N * plane(depth, panels[i].width);
        } else {
            if constexpr (TO_X) pack_for_x<M>(weight, depth, columns, panel, own);
            else pack_for_results<M>(weight, columns, depth, panel, own);
            ready = own;
        }
        float* out = own + N * N * plane(depth, panels.widest());
        for (long tile = from; tile < until; tile += CHUNK) {
            const long count = std::min(CHUNK, until - tile), out_plane = plane(count, panel.width);
            for (int n = 0; n < N * N; n++)
                for (long s = 0; s < panel.width; s += strip)
                    products(count, strip, depth, in + n * in_plane + (tile - begin) * depth, depth, 1,
                             ready + n * size + s * depth, strip, out + n * out_plane + s, panel.width);
            for (long i = 0; i < count; i++)
                from_planes<M, TO_X>(out + i * panel.width, out_plane, panel.width, bias, map, grid, columns,
                                     panel.first, tile + i);
        }
    }
}

// The weight's gradient (O, 3, 3, C), from planes of results' gradients (T, O) and of tiles (T, C); added if `more`.
template <int M>
void weight_gradient(const float* grads, long grads_plane, const float* tiles, long tiles_plane, long count, long outs,
                     long channels, float* to, bool more, float* work, int threads) {
    constexpr int N = M + 2;
    const long wide = up(channels, UNIT), size = plane(OUT_ROWS, wide), panels = (outs + OUT_ROWS - 1) / OUT_ROWS;
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
    for (long panel = 0; panel < panels; panel++) {
        float* own = work + omp_get_thread_num() * gradient_scratch<M>(channels);
        const long first = outs * panel / panels, rows = outs * (panel + 1) / panels - first;
        for (int n = 0; n < N * N; n++)
            for (long c = 0; c < wide; c += STRIP)  // what is read beyond the channels, is not used
                products(rows, std::min(STRIP, wide - c), count, grads + n * grads_plane + first, 1, outs,
                         tiles + n * tiles_plane + c, channels, own + n * size + c, wide);
        for (long o = 0; o < rows; o++)
            for (long c = 0; c < channels; c += WIDTH) {
                vec in[N * N], out[9];
                for (int n = 0; n < N * N; n++) in[n] = load(own + n * size + o * wide + c);
                BOTH(N, 3, filter_back, in, out);
                for (int k = 0; k < 9; k++) {
                    float* at = to + ((first + o) * 9 + k) * channels + c;
                    store_some(at, more ? load_some(at, channels - c) + out[k] : out[k], channels - c);
                }
            }
    }
}

template <int M, bool OF_RESULTS>
void transform(const float* map, const Grid<M>& grid, long channels, long begin, long end, float* to, long size,
               int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (long tile = begin; tile < end; tile++)
        to_planes<M, OF_RESULTS>(map, grid, channels, tile, to + (tile - begin) * channels, size);
}

template <int M>
void forward(const float* x, const float* weight, const float* packed, const float* bias, float* out, float* kept,
             float* work, long numbers, Grid<M> grid, long channels, long outs, int threads) {
    constexpr int N = M + 2;
    const long tiles = grid.tiles(), band = kept ? tiles : band_of<M>(tiles, channels, numbers), size = plane(band, channels);
    float* planes = kept ? kept : work;
    float* rest = kept ? work : work + N * N * size + STRIP;
    for (long begin = 0; begin < tiles; begin += band) {
        const long end = std::min(tiles, begin + band);
        transform<M, false>(x, grid, channels, begin, end, planes, size, threads);
        multiply<M, false>(planes, size, begin, end, weight, packed, bias, out, grid, channels, outs, rest, threads);
    }
}

template <int M>
void backward(const float* grad, const float* x, const float* kept, const float* weight, float* of_x, float* of_weight,
              float* work, long numbers, Grid<M> grid, long channels, long outs, int threads) {
    constexpr int N = M + 2;
    const long tiles = grid.tiles(), band = kept ? tiles : band_of<M>(tiles, std::max(channels, outs), numbers);
    const long grads_plane = plane(band, outs), tiles_plane = plane(band, channels);
    float* grads = work;
    float* again = grads + N * N * grads_plane + STRIP;
    float* rest = kept ? again : again + N * N * tiles_plane + STRIP;
    if (of_x) memset(of_x, 0, grid.batch * grid.height * grid.width * channels * sizeof(float));
    for (long begin = 0; begin < tiles; begin += band) {
        const long end = std::min(tiles, begin + band);
        transform<M, true>(grad, grid, outs, begin, end, grads, grads_plane, threads);
        if (of_x)
            multiply<M, true>(grads, grads_plane, begin, end, weight, nullptr, nullptr, of_x, grid, outs, channels,
                              rest, threads);
        if (!of_weight) continue;
        if (!kept) transform<M, false>(x, grid, channels, begin, end, again, tiles_plane, threads);
        weight_gradient<M>(grads, grads_plane, kept ? kept : again, tiles_plane, end - begin, outs, channels, of_weight,
                           begin > 0, rest, threads);
    }
}

template <int M>
long forward_work(long numbers, Grid<M> grid, long channels, long outs, int kept, int threads) {
    constexpr int N = M + 2;
    const long planes = kept ? 0 : N * N * plane(band_of<M>(grid.tiles(), channels, numbers), channels) + STRIP;
    return planes + threads * scratch<M>(channels, outs);
}

template <int M>
long backward_work(long numbers, Grid<M> grid, long channels, long outs, int kept, int threads) {
    constexpr int N = M + 2;
    const long band = kept ? grid.tiles() : band_of<M>(grid.tiles(), std::max(channels, outs), numbers);
    const long grads = N * N * plane(band, outs) + STRIP, again = kept ? 0 : N * N * plane(band, channels) + STRIP;
    return grads + again + threads * std::max(scratch<M>(outs, channels), gradient_scratch<M>(channels));
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// Numbers that the planes of a map's transformed tiles take.
EXPORT long sfumato_winograd_tiles(long m, long batch, long height, long width, long channels) {
    if (m == 4) return 36 * plane(Grid<4>{batch, height, width}.tiles(), channels) + STRIP;
    return 16 * plane(Grid<2>{batch, height, width}.tiles(), channels) + STRIP;
}

// Numbers that a packed weight takes.
EXPORT long sfumato_winograd_packed(long m, long channels, long outs) {
    const Panels panels(outs);
    long numbers = 0;
    for (long i = 0; i < panels.count; i++) numbers += (m + 2) * (m + 2) * plane(channels, panels[i].width);
    return numbers;
}

EXPORT void sfumato_winograd_pack(long m, const float* weight, float* to, long channels, long outs, long threads) {
    const Panels panels(outs);
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
    for (long i = 0; i < panels.count; i++) {
        float* at = to;
        for (long j = 0; j < i; j++) at += (m + 2) * (m + 2) * plane(channels, panels[j].width);
        if (m == 4) pack_for_results<4>(weight, outs, channels, panels[i], at);
        else pack_for_results<2>(weight, outs, channels, panels[i], at);
    }
}

// Numbers of the memory to work in that a pass takes; `band` as many of transformed tiles are in work at a time.
EXPORT long sfumato_winograd_forward_work(long m, long band, long batch, long height, long width, long channels, long outs,
                                          long kept, long threads) {
    if (m == 4) return forward_work<4>(band, {batch, height, width}, channels, outs, kept, threads);
    return forward_work<2>(band, {batch, height, width}, channels, outs, kept, threads);
}

EXPORT long sfumato_winograd_backward_work(long m, long band, long batch, long height, long width, long channels, long outs,
                                           long kept, long threads) {
    if (m == 4) return backward_work<4>(band, {batch, height, width}, channels, outs, kept, threads);
    return backward_work<2>(band, {batch, height, width}, channels, outs, kept, threads);
}

// out (B, h, w, O) of x (B, h, w, C) and the weight (O, 3, 3, C), or it packed; tiles go into `kept` if it is given.
EXPORT void sfumato_winograd_forward(long m, const float* x, const float* weight, const float* packed,
                                     const float* bias, float* out, float* kept, float* work, long band, long batch,
                                     long height, long width, long channels, long outs, long threads) {
    if (m == 4)
        forward<4>(x, weight, packed, bias, out, kept, work, band, {batch, height, width}, channels, outs, threads);
    else
        forward<2>(x, weight, packed, bias, out, kept, work, band, {batch, height, width}, channels, outs, threads);
}

// The gradients of x and of the weight, each if it is given, from that of the results; from x or its kept tiles.
EXPORT void sfumato_winograd_backward(long m, const float* grad, const float* x, const float* kept, const float* weight,
                                      float* of_x, float* of_weight, float* work, long band, long batch, long height, long width,
                                      long channels, long outs, long threads) {
    if (m == 4)
        backward<4>(grad, x, kept, weight, of_x, of_weight, work, band, {batch, height, width}, channels, outs, threads);
    else
        backward<2>(grad, x, kept, weight, of_x, of_weight, work, band, {batch, height, width}, channels, outs, threads);
}
