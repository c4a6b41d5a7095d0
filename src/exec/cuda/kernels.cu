// The kernels of exec/cuda. Images lie as [N, H, W, C], channels fastest: neighbouring threads take
// neighbouring channels, so that every read and write of a warp is one stretch of memory.
//
// Every kernel takes the same Args; what each slot holds is said above the kernel, and the Rust side
// (ops.rs) fills them in that order. Activations are float32, bfloat16 or float16; sums, statistics
// and parameters of norms are float32 always. Sums over rows are made in rounds of partial sums, in
// an order that depends on the shape alone, so that the same input gives the same bits.
//
// The source is C++ that nvcc compiles for the device and, with emulation.h before it, any C++
// compiler for the CPU: so the tests run these very kernels where there is no device.

struct Args {
    void *p[8];
    int i[12];
    float f[8];
};

struct half_t { unsigned short bits; };
struct bfloat_t { unsigned short bits; };

#ifdef EMULATED
static inline float half_to_float(unsigned short bits) {
    _Float16 h;
    __builtin_memcpy(&h, &bits, 2);
    return (float)h;
}
static inline unsigned short float_to_half(float v) {
    _Float16 h = (_Float16)v;
    unsigned short bits;
    __builtin_memcpy(&bits, &h, 2);
    return bits;
}
static inline float bits_to_float(unsigned u) { float v; __builtin_memcpy(&v, &u, 4); return v; }
static inline unsigned float_to_bits(float v) { unsigned u; __builtin_memcpy(&u, &v, 4); return u; }
#else
__device__ static inline float half_to_float(unsigned short bits) {
    float v;
    asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"(bits));
    return v;
}
__device__ static inline unsigned short float_to_half(float v) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(v));
    return bits;
}
__device__ static inline float bits_to_float(unsigned u) { return __uint_as_float(u); }
__device__ static inline unsigned float_to_bits(float v) { return __float_as_uint(v); }
#endif

__device__ static inline float get(float v) { return v; }
__device__ static inline float get(half_t v) { return half_to_float(v.bits); }
__device__ static inline float get(bfloat_t v) { return bits_to_float((unsigned)v.bits << 16); }

__device__ static inline void put(float &to, float v) { to = v; }
__device__ static inline void put(half_t &to, float v) { to.bits = float_to_half(v); }
__device__ static inline void put(bfloat_t &to, float v) {
    unsigned u = float_to_bits(v);
    // Nearest, ties to even; what is not a number stays one.
    to.bits = v != v ? 0x7fc0 : (unsigned short)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

// A sum that keeps what rounding takes from it (Kahan's): these loops wait for memory, so it is free.
struct Sum {
    float sum = 0, lost = 0;
    __device__ void add(float v) {
        float y = v - lost, next = sum + y;
        lost = next - sum - y;
        sum = next;
    }
};

// V values next to each other, read and written at once.
template <class T, int V> struct alignas(V * sizeof(T)) Pack { T v[V]; };

#define KERNEL(name)                                                                              \
    extern "C" __global__ void name##_f32(Args a) { name<float>(a); }                             \
    extern "C" __global__ void name##_f16(Args a) { name<half_t>(a); }                            \
    extern "C" __global__ void name##_bf16(Args a) { name<bfloat_t>(a); }

// Tensors have less than 2^31 values: 32 bits count them, and divide much faster than 64.
#define INDEX (blockIdx.x * blockDim.x + threadIdx.x)
#define STRIDE (gridDim.x * blockDim.x)

// As in ops.rs.
enum Activation { NONE, RELU, RELU6, HARD_SIGMOID, HARD_SWISH, GELU };

__device__ static inline float activate(int kind, float z) {
    switch (kind) {
    case RELU: return z > 0 ? z : (z != z ? z : 0);
    case RELU6: return z < 0 ? 0 : (z > 6 ? 6 : z);
    case HARD_SIGMOID: return z < -3 ? 0 : (z > 3 ? 1 : (z + 3) / 6);
    case HARD_SWISH: return z < -3 ? 0 : (z > 3 ? z : z * ((z + 3) / 6));
    case GELU: return 0.5f * z * (1 + erff(z * 0.70710678f));
    default: return z;
    }
}

// The derivative, at the ends what PyTorch takes it to be.
__device__ static inline float slope(int kind, float z) {
    switch (kind) {
    case RELU: return z > 0 ? 1 : 0;
    case RELU6: return z > 0 && z < 6 ? 1 : 0;
    case HARD_SIGMOID: return z > -3 && z < 3 ? 1.0f / 6 : 0;
    case HARD_SWISH: return z <= -3 ? 0 : (z >= 3 ? 1 : (2 * z + 3) / 6);
    case GELU:
        return 0.5f * (1 + erff(z * 0.70710678f)) + z * 0.39894228f * expf(-0.5f * z * z);
    default: return 1;
    }
}

// What an activation is given: (x - centre[c]) * scale[c] + shift[c] + residual, each where it is not null.
template <class T, int V> struct Given {
    const Pack<T, V> *x, *residual;
    const float *centre, *scale, *shift;
    int channels;

    // Of p from `first` on: x, centre, scale, shift, residual.
    __device__ Given(const Args &a, int first)
        : x((const Pack<T, V> *)a.p[first]), residual((const Pack<T, V> *)a.p[first + 4]),
          centre((const float *)a.p[first + 1]), scale((const float *)a.p[first + 2]),
          shift((const float *)a.p[first + 3]), channels(a.i[1]) {}

    __device__ void read(unsigned j, float *z) const {
        Pack<T, V> in = x[j], other;
        if (residual) other = residual[j];
        int c = (int)(j * V % channels);
        for (int v = 0; v < V; v++) {
            z[v] = get(in.v[v]);
            if (centre) z[v] -= centre[c + v];
            if (scale) z[v] *= scale[c + v];
            if (shift) z[v] += shift[c + v];
            if (residual) z[v] += get(other.v[v]);
        }
    }
};

// y = activation(given).
// p: x, centre, scale, shift, residual, y. i: values, channels, activation, V.
template <class T, int V> __device__ static void epilogue_of(const Args &a) {
    Given<T, V> given(a, 0);
    Pack<T, V> *y = (Pack<T, V> *)a.p[5];
    for (unsigned j = INDEX; j < a.i[0] / V; j += STRIDE) {
        float z[V];
        given.read(j, z);
        Pack<T, V> out;
        for (int v = 0; v < V; v++) put(out.v[v], activate(a.i[2], z[v]));
        y[j] = out;
    }
}
template <class T> __device__ static void epilogue(const Args &a) {
    a.i[3] == 4 ? epilogue_of<T, 4>(a) : epilogue_of<T, 1>(a);
}
KERNEL(epilogue)

// The gradient of what is given: dz = g * slope(given).
// p: g, x, centre, scale, shift, residual, dz. i: as above.
template <class T, int V> __device__ static void epilogue_backward_of(const Args &a) {
    Given<T, V> given(a, 1);
    const Pack<T, V> *g = (const Pack<T, V> *)a.p[0];
    Pack<T, V> *dz = (Pack<T, V> *)a.p[6];
    for (unsigned j = INDEX; j < a.i[0] / V; j += STRIDE) {
        float z[V];
        given.read(j, z);
        Pack<T, V> grad = g[j], out;
        for (int v = 0; v < V; v++) put(out.v[v], get(grad.v[v]) * slope(a.i[2], z[v]));
        dz[j] = out;
    }
}
template <class T> __device__ static void epilogue_backward(const Args &a) {
    a.i[3] == 4 ? epilogue_backward_of<T, 4>(a) : epilogue_backward_of<T, 1>(a);
}
KERNEL(epilogue_backward)

// out[b, k, c] = factor * the sum of x[b, r, c] (times other, where there is one) over the rows
// r = k, k + parts, ...: a round of a sum over rows.
// p: x, other or null, out (float32). i: batches, rows, channels, parts. f: factor.
template <class T> __device__ static void sum_rows(const Args &a) {
    const T *x = (const T *)a.p[0], *other = (const T *)a.p[1];
    float *out = (float *)a.p[2];
    int rows = a.i[1], channels = a.i[2], parts = a.i[3];
    unsigned wide = (unsigned)parts * channels;
    for (unsigned j = INDEX; j < a.i[0] * wide; j += STRIDE) {
        unsigned b = j / wide, lane = j % wide;
        unsigned at = b * rows * channels + lane, end = (b + 1) * rows * channels;
        Sum sum;
        if (other)
            for (; at < end; at += wide) sum.add(get(x[at]) * get(other[at]));
        else
            for (; at < end; at += wide) sum.add(get(x[at]));
        out[j] = sum.sum * a.f[0];
    }
}
KERNEL(sum_rows)

// The first round of a channel's sums of x - x0 and of its square, x0 being the channel's first
// value: near the mean, so that the variance loses no digits.
// p: x, out [2, parts, C] (float32). i: rows, channels, parts.
template <class T> __device__ static void moments(const Args &a) {
    const T *x = (const T *)a.p[0];
    float *out = (float *)a.p[1];
    unsigned wide = (unsigned)a.i[2] * a.i[1], end = (unsigned)a.i[0] * a.i[1];
    for (unsigned j = INDEX; j < wide; j += STRIDE) {
        float first = get(x[j % a.i[1]]);
        Sum sum, squares;
        for (unsigned at = j; at < end; at += wide) {
            float v = get(x[at]) - first;
            sum.add(v);
            squares.add(v * v);
        }
        out[j] = sum.sum;
        out[wide + j] = squares.sum;
    }
}
KERNEL(moments)

// A batch norm's numbers from those sums: mean, 1 / deviation, scale, bias, new running mean and
// variance.
// p: x, sums [2, C], weight, bias, running mean, running variance, out [6, C]. i: rows, channels.
// f: eps, momentum.
template <class T> __device__ static void batch_norm_numbers(const Args &a) {
    const T *x = (const T *)a.p[0];
    const float *sums = (const float *)a.p[1];
    const float *weight = (const float *)a.p[2], *bias = (const float *)a.p[3];
    const float *old_mean = (const float *)a.p[4], *old_variance = (const float *)a.p[5];
    float *out = (float *)a.p[6];
    int channels = a.i[1];
    for (unsigned c = INDEX; c < channels; c += STRIDE) {
        double count = a.i[0], away = sums[c] / count;
        double variance = sums[channels + c] / count - away * away;
        if (variance < 0) variance = 0;
        float mean = (float)(get(x[c]) + away);
        float inverse = (float)(1 / sqrt(variance + (double)a.f[0]));
        float scale = weight[c] * inverse;
        float momentum = a.f[1];
        out[c] = mean;
        out[channels + c] = inverse;
        out[2 * channels + c] = scale;
        out[3 * channels + c] = bias[c];
        out[4 * channels + c] = old_mean[c] * (1 - momentum) + mean * momentum;
        out[5 * channels + c] =
            old_variance[c] * (1 - momentum) + (float)(variance * count / (count - 1)) * momentum;
    }
}
KERNEL(batch_norm_numbers)

// The first round of the sums of dz and of dz * (x - mean) / deviation, which are the gradients of
// a batch norm's bias and weight; dz = g * slope.
// p: g, x, numbers [6, C], out [2, parts, C] (float32). i: rows, channels, parts, activation.
template <class T> __device__ static void batch_norm_sums(const Args &a) {
    const T *g = (const T *)a.p[0], *x = (const T *)a.p[1];
    const float *numbers = (const float *)a.p[2];
    float *out = (float *)a.p[3];
    int channels = a.i[1], kind = a.i[3];
    unsigned wide = (unsigned)a.i[2] * channels, end = (unsigned)a.i[0] * channels;
    for (unsigned j = INDEX; j < wide; j += STRIDE) {
        int c = (int)(j % channels);
        float mean = numbers[c], inverse = numbers[channels + c];
        float scale = numbers[2 * channels + c], bias = numbers[3 * channels + c];
        Sum sum, product;
        for (unsigned at = j; at < end; at += wide) {
            float v = get(x[at]), dz = get(g[at]);
            if (kind) dz *= slope(kind, (v - mean) * scale + bias);
            sum.add(dz);
            product.add(dz * (v - mean) * inverse);
        }
        out[j] = sum.sum;
        out[wide + j] = product.sum;
    }
}
KERNEL(batch_norm_sums)

// dx = scale * (dz - mean(dz) - normalised x * mean(dz * normalised x)).
// p: g, x, numbers [6, C], sums [2, C], dx. i: values, channels, activation, V. f: 1 / rows.
template <class T, int V> __device__ static void batch_norm_backward_of(const Args &a) {
    typedef Pack<T, V> P;
    const P *g = (const P *)a.p[0], *x = (const P *)a.p[1];
    const float *numbers = (const float *)a.p[2], *sums = (const float *)a.p[3];
    P *dx = (P *)a.p[4];
    int channels = a.i[1], kind = a.i[2];
    for (unsigned j = INDEX; j < a.i[0] / V; j += STRIDE) {
        P in = x[j], grad = g[j], out;
        int first = (int)(j * V % channels);
        for (int v = 0; v < V; v++) {
            int c = first + v;
            float scale = numbers[2 * channels + c], value = get(in.v[v]), dz = get(grad.v[v]);
            value -= numbers[c];
            if (kind) dz *= slope(kind, value * scale + numbers[3 * channels + c]);
            float normalised = value * numbers[channels + c];
            float mean = sums[c] * a.f[0], product = sums[channels + c] * a.f[0];
            put(out.v[v], scale * (dz - mean - normalised * product));
        }
        dx[j] = out;
    }
}
template <class T> __device__ static void batch_norm_backward(const Args &a) {
    a.i[3] == 4 ? batch_norm_backward_of<T, 4>(a) : batch_norm_backward_of<T, 1>(a);
}
KERNEL(batch_norm_backward)

// y[n, r, c] = x[n, r, c] * s[n, c] (squeeze-and-excitation).
// p: x, s, y. i: values, values of an image, channels.
template <class T> __device__ static void scale_channels(const Args &a) {
    const T *x = (const T *)a.p[0], *s = (const T *)a.p[1];
    T *y = (T *)a.p[2];
    for (unsigned j = INDEX; j < a.i[0]; j += STRIDE)
        put(y[j], get(x[j]) * get(s[j / a.i[1] * a.i[2] + j % a.i[2]]));
}
KERNEL(scale_channels)

// A mean's gradient, back to every pixel: y[n, r, c] = s[n, c] * factor.
// p: s, y. i: values, values of an image, channels. f: factor.
template <class T> __device__ static void spread(const Args &a) {
    const T *s = (const T *)a.p[0];
    T *y = (T *)a.p[1];
    for (unsigned j = INDEX; j < a.i[0]; j += STRIDE)
        put(y[j], get(s[j / a.i[1] * a.i[2] + j % a.i[2]]) * a.f[0]);
}
KERNEL(spread)

// Of windows on an image: i[0] images, i[1] x i[2] pixels of i[3] channels in, i[4] x i[5] out,
// i[6] x i[7] taps, i[8] stride, i[9] rows and i[10] columns of padding before.
struct Windows {
    int n, h, w, c, out_h, out_w, kh, kw, stride, top, left;
    __device__ Windows(const Args &a)
        : n(a.i[0]), h(a.i[1]), w(a.i[2]), c(a.i[3]), out_h(a.i[4]), out_w(a.i[5]), kh(a.i[6]),
          kw(a.i[7]), stride(a.i[8]), top(a.i[9]), left(a.i[10]) {}
    // The output row (or column) whose window has the row y under tap k; -1 where there is none.
    __device__ int before(int y, int k, int padding, int count) const {
        int at = y + padding - k;
        return at < 0 || at % stride || at / stride >= count ? -1 : at / stride;
    }
};

// columns[n, oy, ox, tap, c]: what every window sees, zeros beyond the image.
// p: x, columns. i: windows.
template <class T> __device__ static void unfold(const Args &a) {
    Windows s(a);
    const T *x = (const T *)a.p[0];
    T *columns = (T *)a.p[1];
    unsigned total = (unsigned)s.n * s.out_h * s.out_w * s.kh * s.kw * s.c;
    for (unsigned j = INDEX; j < total; j += STRIDE) {
        int c = (int)(j % s.c);
        unsigned rest = j / s.c;
        int kx = (int)(rest % s.kw), ky = (int)(rest / s.kw % s.kh);
        rest /= s.kw * s.kh;
        int ox = (int)(rest % s.out_w), oy = (int)(rest / s.out_w % s.out_h);
        int n = (int)(rest / s.out_w / s.out_h);
        int y = oy * s.stride + ky - s.top, left = ox * s.stride + kx - s.left;
        bool inside = y >= 0 && y < s.h && left >= 0 && left < s.w;
        T zero;
        put(zero, 0);
        columns[j] = inside ? x[(((unsigned)n * s.h + y) * s.w + left) * s.c + c] : zero;
    }
}
KERNEL(unfold)

// The way back: every pixel's sum over the windows that see it.
// p: columns, dx. i: windows.
template <class T> __device__ static void fold(const Args &a) {
    Windows s(a);
    const T *columns = (const T *)a.p[0];
    T *dx = (T *)a.p[1];
    unsigned total = (unsigned)s.n * s.h * s.w * s.c;
    for (unsigned j = INDEX; j < total; j += STRIDE) {
        int c = (int)(j % s.c), x = (int)(j / s.c % s.w), y = (int)(j / s.c / s.w % s.h);
        unsigned n = j / s.c / s.w / s.h;
        float sum = 0;
        for (int ky = 0; ky < s.kh; ky++) {
            int oy = s.before(y, ky, s.top, s.out_h);
            if (oy < 0) continue;
            for (int kx = 0; kx < s.kw; kx++) {
                int ox = s.before(x, kx, s.left, s.out_w);
                if (ox < 0) continue;
                unsigned window = (n * s.out_h + oy) * s.out_w + ox;
                sum += get(columns[((window * s.kh + ky) * s.kw + kx) * s.c + c]);
            }
        }
        put(dx[j], sum);
    }
}
KERNEL(fold)

// Products that are added up in one go.
#define CHAIN 16

// Convolution of few channels a group. Weights are [kh, kw, inputs of a group, K].
// p: x, weights, y. i: windows, then i[11] output channels K. f: groups.
template <class T> __device__ static void grouped(const Args &a) {
    Windows s(a);
    const T *x = (const T *)a.p[0], *weights = (const T *)a.p[1];
    T *y = (T *)a.p[2];
    int outputs = a.i[11], groups = (int)a.f[0];
    int inputs = s.c / groups, each = outputs / groups;
    unsigned total = (unsigned)s.n * s.out_h * s.out_w * outputs;
    for (unsigned j = INDEX; j < total; j += STRIDE) {
        int k = (int)(j % outputs), ox = (int)(j / outputs % s.out_w);
        int oy = (int)(j / outputs / s.out_w % s.out_h);
        unsigned n = j / outputs / s.out_w / s.out_h;
        const T *image = x + n * s.h * s.w * s.c + k / each * inputs;
        float sum = 0;
        for (int ky = 0; ky < s.kh; ky++) {
            int py = oy * s.stride + ky - s.top;
            if (py < 0 || py >= s.h) continue;
            for (int kx = 0; kx < s.kw; kx++) {
                int px = ox * s.stride + kx - s.left;
                if (px < 0 || px >= s.w) continue;
                const T *pixel = image + (py * s.w + px) * s.c;
                const T *weight = weights + (ky * s.kw + kx) * inputs * outputs + k;
                // In two levels: short chains lose fewer digits.
                for (int first = 0; first < inputs; first += CHAIN) {
                    float part = 0;
                    for (int i = first; i < first + CHAIN && i < inputs; i++)
                        part += get(pixel[i]) * get(weight[i * outputs]);
                    sum += part;
                }
            }
        }
        put(y[j], sum);
    }
}
KERNEL(grouped)

// Its gradient at the input. p: g, weights, dx. The rest as above.
template <class T> __device__ static void grouped_input(const Args &a) {
    Windows s(a);
    const T *g = (const T *)a.p[0], *weights = (const T *)a.p[1];
    T *dx = (T *)a.p[2];
    int outputs = a.i[11], groups = (int)a.f[0];
    int inputs = s.c / groups, each = outputs / groups;
    unsigned total = (unsigned)s.n * s.h * s.w * s.c;
    for (unsigned j = INDEX; j < total; j += STRIDE) {
        int c = (int)(j % s.c), x = (int)(j / s.c % s.w), y = (int)(j / s.c / s.w % s.h);
        unsigned n = j / s.c / s.w / s.h;
        int first = c / inputs * each;
        float sum = 0;
        for (int ky = 0; ky < s.kh; ky++) {
            int oy = s.before(y, ky, s.top, s.out_h);
            if (oy < 0) continue;
            for (int kx = 0; kx < s.kw; kx++) {
                int ox = s.before(x, kx, s.left, s.out_w);
                if (ox < 0) continue;
                const T *grad = g + ((n * s.out_h + oy) * s.out_w + ox) * outputs + first;
                const T *weight = weights +
                    ((ky * s.kw + kx) * inputs + c % inputs) * outputs + first;
                for (int first = 0; first < each; first += CHAIN) {
                    float part = 0;
                    for (int k = first; k < first + CHAIN && k < each; k++)
                        part += get(grad[k]) * get(weight[k]);
                    sum += part;
                }
            }
        }
        put(dx[j], sum);
    }
}
KERNEL(grouped_input)

// The first round of its gradient at the weights, rows of output pixels dealt out to the parts.
// p: g, x, out [parts, kh, kw, inputs, K] (float32). i: windows, then K. f: groups, parts.
template <class T> __device__ static void grouped_weights(const Args &a) {
    Windows s(a);
    const T *g = (const T *)a.p[0], *x = (const T *)a.p[1];
    float *out = (float *)a.p[2];
    int outputs = a.i[11], groups = (int)a.f[0], parts = (int)a.f[1];
    int inputs = s.c / groups, each = outputs / groups;
    unsigned total = (unsigned)parts * s.kh * s.kw * inputs * outputs;
    for (unsigned j = INDEX; j < total; j += STRIDE) {
        int k = (int)(j % outputs), i = (int)(j / outputs % inputs);
        unsigned rest = j / outputs / inputs;
        int kx = (int)(rest % s.kw), ky = (int)(rest / s.kw % s.kh);
        int part = (int)(rest / s.kw / s.kh);
        int c = k / each * inputs + i;
        Sum sum;
        for (unsigned row = part; row < (unsigned)s.n * s.out_h; row += parts) {
            unsigned n = row / s.out_h;
            int y = (int)(row % s.out_h) * s.stride + ky - s.top;
            if (y < 0 || y >= s.h) continue;
            const T *pixels = x + (n * s.h + y) * s.w * s.c + c;
            const T *grads = g + row * s.out_w * outputs + k;
            for (int ox = 0; ox < s.out_w; ox++) {
                int px = ox * s.stride + kx - s.left;
                if (px < 0 || px >= s.w) continue;
                sum.add(get(pixels[px * s.c]) * get(grads[ox * outputs]));
            }
        }
        out[j] = sum.sum;
    }
}
KERNEL(grouped_weights)

// p: x, y, the tap that each maximum came from (bytes). i: windows.
template <class T> __device__ static void max_pool(const Args &a) {
    Windows s(a);
    const T *x = (const T *)a.p[0];
    T *y = (T *)a.p[1];
    unsigned char *taps = (unsigned char *)a.p[2];
    unsigned total = (unsigned)s.n * s.out_h * s.out_w * s.c;
    for (unsigned j = INDEX; j < total; j += STRIDE) {
        int c = (int)(j % s.c), ox = (int)(j / s.c % s.out_w), oy = (int)(j / s.c / s.out_w % s.out_h);
        unsigned n = j / s.c / s.out_w / s.out_h;
        float most = 0;
        int tap = -1;
        T best;
        put(best, 0);
        for (int ky = 0; ky < s.kh; ky++) {
            int py = oy * s.stride + ky - s.top;
            if (py < 0 || py >= s.h) continue;
            for (int kx = 0; kx < s.kw; kx++) {
                int px = ox * s.stride + kx - s.left;
                if (px < 0 || px >= s.w) continue;
                T value = x[((n * s.h + py) * s.w + px) * s.c + c];
                float v = get(value);
                // The first of equals, and what is not a number, as in PyTorch.
                if (tap < 0 || v > most || v != v) {
                    most = v;
                    best = value;
                    tap = ky * s.kw + kx;
                }
            }
        }
        y[j] = best;
        taps[j] = (unsigned char)tap;
    }
}
KERNEL(max_pool)

// p: g, taps, dx. i: windows.
template <class T> __device__ static void max_pool_backward(const Args &a) {
    Windows s(a);
    const T *g = (const T *)a.p[0];
    const unsigned char *taps = (const unsigned char *)a.p[1];
    T *dx = (T *)a.p[2];
    unsigned total = (unsigned)s.n * s.h * s.w * s.c;
    for (unsigned j = INDEX; j < total; j += STRIDE) {
        int c = (int)(j % s.c), x = (int)(j / s.c % s.w), y = (int)(j / s.c / s.w % s.h);
        unsigned n = j / s.c / s.w / s.h;
        float sum = 0;
        for (int ky = 0; ky < s.kh; ky++) {
            int oy = s.before(y, ky, s.top, s.out_h);
            if (oy < 0) continue;
            for (int kx = 0; kx < s.kw; kx++) {
                int ox = s.before(x, kx, s.left, s.out_w);
                if (ox < 0) continue;
                unsigned at = ((n * s.out_h + oy) * s.out_w + ox) * s.c + c;
                if (taps[at] == ky * s.kw + kx) sum += get(g[at]);
            }
        }
        put(dx[j], sum);
    }
}
KERNEL(max_pool_backward)

// The sum of a value over the warp's lanes, in all of them.
__device__ static inline float warp_sum(float v) {
    for (int away = 16; away; away /= 2) v += __shfl_xor_sync(~0u, v, away);
    return v;
}
__device__ static inline float warp_max(float v) {
    for (int away = 16; away; away /= 2) v = fmaxf(v, __shfl_xor_sync(~0u, v, away));
    return v;
}

// Rows of these kernels are a warp's each.
#define ROW (INDEX / 32)
#define ROWS (STRIDE / 32)
#define LANE (threadIdx.x % 32)

// p: x, weight, bias, y, numbers [2, rows] (mean and 1 / deviation). i: rows, width. f: eps.
template <class T> __device__ static void layer_norm(const Args &a) {
    const float *weight = (const float *)a.p[1], *bias = (const float *)a.p[2];
    float *numbers = (float *)a.p[4];
    int width = a.i[1];
    for (unsigned row = ROW; row < a.i[0]; row += ROWS) {
        const T *x = (const T *)a.p[0] + row * width;
        T *y = (T *)a.p[3] + row * width;
        float sum = 0;
        for (int d = LANE; d < width; d += 32) sum += get(x[d]);
        float mean = warp_sum(sum) / width, squares = 0;
        for (int d = LANE; d < width; d += 32) {
            float v = get(x[d]) - mean;
            squares += v * v;
        }
        float inverse = 1 / sqrtf(warp_sum(squares) / width + a.f[0]);
        for (int d = LANE; d < width; d += 32)
            put(y[d], (get(x[d]) - mean) * inverse * weight[d] + bias[d]);
        if (LANE == 0) {
            numbers[row] = mean;
            numbers[a.i[0] + row] = inverse;
        }
    }
}
KERNEL(layer_norm)

// p: g, x, weight, numbers [2, rows], dx. i: rows, width.
template <class T> __device__ static void layer_norm_backward(const Args &a) {
    const float *weight = (const float *)a.p[2], *numbers = (const float *)a.p[3];
    int width = a.i[1];
    for (unsigned row = ROW; row < a.i[0]; row += ROWS) {
        const T *g = (const T *)a.p[0] + row * width, *x = (const T *)a.p[1] + row * width;
        T *dx = (T *)a.p[4] + row * width;
        float mean = numbers[row], inverse = numbers[a.i[0] + row], sum = 0, product = 0;
        for (int d = LANE; d < width; d += 32) {
            float dz = get(g[d]) * weight[d];
            sum += dz;
            product += dz * (get(x[d]) - mean) * inverse;
        }
        sum = warp_sum(sum) / width;
        product = warp_sum(product) / width;
        for (int d = LANE; d < width; d += 32) {
            float normalised = (get(x[d]) - mean) * inverse;
            put(dx[d], (get(g[d]) * weight[d] - sum - normalised * product) * inverse);
        }
    }
}
KERNEL(layer_norm_backward)

// The first round of the gradients of a layer norm's bias and weight.
// p: g, x, numbers [2, rows], out [2, parts, width] (float32). i: rows, width, parts.
template <class T> __device__ static void layer_norm_sums(const Args &a) {
    const T *g = (const T *)a.p[0], *x = (const T *)a.p[1];
    const float *numbers = (const float *)a.p[2];
    float *out = (float *)a.p[3];
    int rows = a.i[0], width = a.i[1], parts = a.i[2];
    unsigned wide = (unsigned)parts * width;
    for (unsigned j = INDEX; j < wide; j += STRIDE) {
        Sum sum, product;
        for (unsigned row = j / width; row < rows; row += parts) {
            unsigned at = row * width + j % width;
            float grad = get(g[at]);
            sum.add(grad);
            product.add(grad * (get(x[at]) - numbers[row]) * numbers[rows + row]);
        }
        out[j] = sum.sum;
        out[wide + j] = product.sum;
    }
}
KERNEL(layer_norm_sums)

// p: x, y. i: rows, width. f: what x is multiplied with first.
template <class T> __device__ static void softmax(const Args &a) {
    int width = a.i[1];
    for (unsigned row = ROW; row < a.i[0]; row += ROWS) {
        const T *x = (const T *)a.p[0] + row * width;
        T *y = (T *)a.p[1] + row * width;
        float most = -3.4e38f, sum = 0;
        for (int d = LANE; d < width; d += 32) most = fmaxf(most, get(x[d]) * a.f[0]);
        most = warp_max(most);
        for (int d = LANE; d < width; d += 32) sum += expf(get(x[d]) * a.f[0] - most);
        sum = 1 / warp_sum(sum);
        for (int d = LANE; d < width; d += 32) put(y[d], expf(get(x[d]) * a.f[0] - most) * sum);
    }
}
KERNEL(softmax)

// p: g, y, dx. i: rows, width. f: as above.
template <class T> __device__ static void softmax_backward(const Args &a) {
    int width = a.i[1];
    for (unsigned row = ROW; row < a.i[0]; row += ROWS) {
        const T *g = (const T *)a.p[0] + row * width, *y = (const T *)a.p[1] + row * width;
        T *dx = (T *)a.p[2] + row * width;
        float sum = 0;
        for (int d = LANE; d < width; d += 32) sum += get(g[d]) * get(y[d]);
        sum = warp_sum(sum);
        for (int d = LANE; d < width; d += 32)
            put(dx[d], get(y[d]) * (get(g[d]) - sum) * a.f[0]);
    }
}
KERNEL(softmax_backward)

// A step of SGD in place, as PyTorch takes it. All float32.
// p: parameter, gradient, velocity or null. i: values, Nesterov. f: rate, momentum, decay, scale.
extern "C" __global__ void sgd(Args a) {
    float *p = (float *)a.p[0], *velocity = (float *)a.p[2];
    const float *g = (const float *)a.p[1];
    for (unsigned j = INDEX; j < a.i[0]; j += STRIDE) {
        float step = g[j] * a.f[3] + p[j] * a.f[2];
        if (velocity) {
            float next = velocity[j] * a.f[1] + step;
            velocity[j] = next;
            step = a.i[1] ? step + next * a.f[1] : next;
        }
        p[j] -= step * a.f[0];
    }
}

// A step of AdamW in place, as PyTorch takes it. All float32.
// p: parameter, gradient, mean, mean square. i: values. f: what the parameter is multiplied with, the
// step's size, beta1, beta2, eps, the root of the square's correction, the gradient's factor.
extern "C" __global__ void adamw(Args a) {
    float *p = (float *)a.p[0], *mean = (float *)a.p[2], *square = (float *)a.p[3];
    const float *g = (const float *)a.p[1];
    for (unsigned j = INDEX; j < a.i[0]; j += STRIDE) {
        float grad = g[j] * a.f[6];
        float m = mean[j] + (grad - mean[j]) * (1 - a.f[2]);
        float v = square[j] * a.f[3] + grad * grad * (1 - a.f[3]);
        mean[j] = m;
        square[j] = v;
        p[j] = p[j] * a.f[0] - a.f[1] * m / (sqrtf(v) / a.f[5] + a.f[4]);
    }
}
