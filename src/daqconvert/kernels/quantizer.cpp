// The quantizers' arithmetic on float32: each function is one pass over memory. It is called through a C interface and
// needs no header of torch. functional/grid.py has the same formulas in plain torch.
//
// It is built without -ffast-math and with -ffp-contract=off: every division is a division and every product is rounded
// before it is added, so that codes and outputs are those of torch, bit for bit. Sums are taken block by block, in
// blocks of a fixed size and in a fixed order, so that they do not depend on the number of threads.
//
// A weight is seen as (A, B, C, D), in this order in memory. The index of its parameters, its output channel, is
// a * C + c. The weight of a linear layer or convolution is (1, 1, C_out, K), that of a transposed convolution
// (groups, C_in / groups, C_out / groups, kernel), and one with a single bound for all elements (1, 1, 1, N).

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t BLOCK = 1 << 13;  // elements handled at once by one thread
constexpr float TINY = 1e-12f;      // functional.grid.TINY

// How the slope of the rounding is computed from u = |1 - 2t| in [0, 1] (slope_numbers of functional/native.py chooses):
//   STE       1
//   RATIONAL  c * (1 + 2 / (exp(a) * expm1(u) + expm1(a))); numbers c, exp(a), expm1(a); all terms are positive
//   SCALED    1 + c * sign(g) * (x - round(x)); number c
//   SECH      c * sech(k * u / 2)^2; numbers 4 * c, k
//   degree    a polynomial of that degree; numbers are its coefficients, the highest power first
constexpr int STE = 0, RATIONAL = -1, SCALED = -2, SECH = -3;

struct Slope {
  float numbers[9];
};

// exp(-y) for y >= 0, relative error 1e-7. It never reaches 0: y ends at 80, and exp(-80) is near the smallest float32.
inline float exp_of_minus(float y) {
  y = y > 80.0f ? 80.0f : y;
  const float n = std::rint(y * -1.44269504f);
  float r = -y - n * 0.693359375f;  // ln 2 in two parts
  r = r + n * 2.12194440e-4f;
  float p = 1.98412698e-4f;
  p = p * r + 1.38888889e-3f;
  p = p * r + 8.33333333e-3f;
  p = p * r + 4.16666667e-2f;
  p = p * r + 1.66666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  return p * power;
}

template <int KIND>
inline float slope_at(float x, const Slope& s) {
  if (KIND == STE) return 1.0f;
  const float t = x - std::floor(x);
  const float u = std::fabs(1.0f - 2.0f * t);
  if (KIND == RATIONAL) {
    // expm1(u) / u on [0, 1], relative error 5e-9 (Chebyshev fit, degree 6)
    float p = 3.0993393e-4f;
    p = p * u + 1.2232134e-3f;
    p = p * u + 8.4507161e-3f;
    p = p * u + 4.1624622e-2f;
    p = p * u + 1.6667378e-1f;
    p = p * u + 4.9999955e-1f;
    p = p * u + 1.0f;
    return s.numbers[0] + (2.0f * s.numbers[0]) / (s.numbers[1] * (p * u) + s.numbers[2]);
  }
  if (KIND == SECH) {
    const float e = exp_of_minus(s.numbers[1] * u);
    return s.numbers[0] * e / ((1.0f + e) * (1.0f + e));
  }
  float p = s.numbers[0];
  for (int i = 1; i <= KIND; i++) p = p * u + s.numbers[i];
  return p;
}

// The gradient to the input of a rounding, from the gradient to its output.
template <int KIND>
inline float passed_at(float g, float x, const Slope& s) {
  if (KIND == SCALED) return g + std::fabs(g) * ((x - std::rint(x)) * s.numbers[0]);
  return g * slope_at<KIND>(x, s);
}

// Calls the block function that is compiled for this kind of slope.
template <template <int> class Block, class... Arguments>
inline auto with_slope(int kind, Arguments... arguments) {
  switch (kind) {
    case STE: return Block<STE>::run(arguments...);
    case 3: return Block<3>::run(arguments...);
    case 5: return Block<5>::run(arguments...);
    case 8: return Block<8>::run(arguments...);
    case SCALED: return Block<SCALED>::run(arguments...);
    case SECH: return Block<SECH>::run(arguments...);
    default: return Block<RATIONAL>::run(arguments...);
  }
}

// Written so that NaN stays NaN.
inline float clip(float x, float low, float high) {
  x = x < low ? low : x;
  return x > high ? high : x;
}

struct Rows {
  int64_t A, B, C, D, blocks;
  Rows(const int64_t* view) : A(view[0]), B(view[1]), C(view[2]), D(view[3]), blocks((D + BLOCK - 1) / BLOCK) {}
  int64_t tasks() const { return A * B * C * blocks; }
  int64_t elements() const { return A * B * C * D; }
  int64_t channels() const { return A * C; }
  int64_t channel(int64_t task) const {
    const int64_t row = task / blocks;
    return row / (B * C) * C + row % C;
  }
  int64_t begin(int64_t task) const { return task / blocks * D + task % blocks * BLOCK; }
  int64_t size(int64_t task) const {
    const int64_t from = task % blocks * BLOCK;
    return D - from < BLOCK ? D - from : BLOCK;
  }
};

inline int used(int threads, int64_t elements) { return elements < 2 * BLOCK ? 1 : threads; }

inline uint64_t mix(uint64_t h, uint64_t w) {
  h = (h ^ w) * 0x9E3779B97F4A7C15ull;
  return h ^ (h >> 29);
}

// A 64-bit fingerprint of one block, 16 interleaved lanes.
uint64_t fingerprint_block(const float* x, int64_t n) {
  constexpr int LANES = 16;
  uint64_t h[LANES], w[LANES];
  for (int l = 0; l < LANES; l++) h[l] = 0x243F6A8885A308D3ull + l;
  int64_t i = 0;
  for (; i + 2 * LANES <= n; i += 2 * LANES) {
    std::memcpy(w, x + i, sizeof w);
    for (int l = 0; l < LANES; l++) h[l] = mix(h[l], w[l]);
  }
  uint64_t out = static_cast<uint64_t>(n);
  for (; i < n; i++) {
    uint32_t word;
    std::memcpy(&word, x + i, 4);
    out = mix(out, word);
  }
  for (int l = 0; l < LANES; l++) out = mix(out, h[l]);
  return out;
}

template <bool CODES>
void input_block(const float* x, float* out, uint8_t* codes, int64_t n, float scale, float zero_point, float top) {
  const float low = -zero_point, high = top - zero_point;
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    const float q = std::rint(clip(x[i] / scale, low, high));
    out[i] = q;
    if (CODES) codes[i] = static_cast<uint8_t>(static_cast<int32_t>(q + zero_point));
  }
}

template <int KIND>
struct InputBackward {
  static float run(
      const float* g, const float* x, float* out, int64_t n, float scale, float zero_point, float top,
      const Slope* s) {
    const float low = -zero_point, high = top - zero_point;
    const float inverse = 1.0f / scale;  // a gradient may be rounded twice; a level needs the exact division
    const Slope slope = *s;
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) {
      const float v = x[i] / scale;
      const bool inside = v > low && v < high;
      const float passed = inside ? passed_at<KIND>(g[i], v, slope) : 0.0f;
      sum += inside ? passed * v : 0.0f;
      out[i] = passed * inverse;
    }
    return sum;
  }
};

struct WeightGrid {
  const float *lower, *upper, *mean, *std;  // one per channel; mean and std are null without normalization
  float low, top;           // lowest and highest rounded level unit: 0 and n where midrise, else operands
  bool midrise;
};

template <bool NORMALIZE, bool MIDRISE>
inline float weight_level(float w, float mean, float std, float lower, float scale) {
  const float v = NORMALIZE ? (w - mean) / std : w;
  return MIDRISE ? (v - lower) / scale : v / scale;
}

inline float weight_lower(const WeightGrid& p, int64_t c) { return p.mean ? p.lower[c] : -p.upper[c]; }

inline float weight_scale(const WeightGrid& p, int64_t c) {
  const float width = p.midrise ? p.upper[c] - weight_lower(p, c) : p.upper[c];
  return (width < TINY ? TINY : width) / p.top;
}

template <bool NORMALIZE, bool MIDRISE>
void weight_block(const float* w, float* out, uint8_t* codes, int64_t n, const WeightGrid& p, int64_t c) {
  const float scale = weight_scale(p, c), lower = weight_lower(p, c), top = p.top;
  const float mean = NORMALIZE ? p.mean[c] : 0.0f, std = NORMALIZE ? p.std[c] : 1.0f;
  const float low = MIDRISE ? 0.0f : p.low;
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    const float q = std::rint(clip(weight_level<NORMALIZE, MIDRISE>(w[i], mean, std, lower, scale), low, top));
    if (out) out[i] = MIDRISE ? 2.0f * q - top : q;
    codes[i] = static_cast<uint8_t>(static_cast<int32_t>(q - low));
  }
}

template <bool NORMALIZE, bool MIDRISE>
struct Weight {
  template <int KIND>
  struct Backward {
    static void run(
        const float* g, const float* w, float* out, int64_t n, const WeightGrid* grid, int64_t c, const Slope* s,
        double* sums) {
      const WeightGrid& p = *grid;
      const float scale = weight_scale(p, c), lower = weight_lower(p, c), top = p.top;
      const float mean = NORMALIZE ? p.mean[c] : 0.0f, std = NORMALIZE ? p.std[c] : 1.0f;
      const float low = MIDRISE ? 0.0f : p.low, step = MIDRISE ? 2.0f : 1.0f;
      const float inverse = 1.0f / scale / std;
      const Slope slope = *s;
      float plain = 0.0f, times = 0.0f;
#pragma omp simd reduction(+ : plain, times)
      for (int64_t i = 0; i < n; i++) {
        const float x = weight_level<NORMALIZE, MIDRISE>(w[i], mean, std, lower, scale);
        const bool inside = x >= low && x <= top;
        const float passed = inside ? passed_at<KIND>(step * g[i], x, slope) : 0.0f;
        plain += passed;
        times += inside ? passed * x : 0.0f;
        out[i] = passed * inverse;
      }
      sums[0] = plain;
      sums[1] = times;
    }
  };
};

}  // namespace

extern "C" {

// Scale and zero point of an input, as functional.grid.input_scale and input_zero_point compute them. A null `lower`
// stands for the lower bound of an unsigned input, which is 0.
void daq_input_parameters(const float* lower, const float* upper, float top, float* scale, float* zero_point) {
  const float high = *upper < 0.0f ? 0.0f : *upper, low = !lower || *lower > 0.0f ? 0.0f : *lower;
  const float width = high - low;
  *scale = (width < TINY ? TINY : width) / top;
  *zero_point = clip(std::rint(-low / *scale), 0.0f, top);
}

// operand = clip(round(x / scale), -zero_point, top - zero_point); codes = operand + zero_point, unless null.
void daq_quantize_input(
    const float* x, float* out, uint8_t* codes, int64_t n, const float* scale, const float* zero_point, float top,
    int threads) {
  const int64_t blocks = (n + BLOCK - 1) / BLOCK;
  const float s = *scale, z = *zero_point;
#pragma omp parallel for num_threads(used(threads, n)) schedule(static)
  for (int64_t b = 0; b < blocks; b++) {
    const int64_t from = b * BLOCK, size = n - from < BLOCK ? n - from : BLOCK;
    if (codes)
      input_block<true>(x + from, out + from, codes + from, size, s, z, top);
    else
      input_block<false>(x + from, out + from, nullptr, size, s, z, top);
  }
}

// Gradients to x and to both bounds; that to `lower` is 0 if it is null. grad_scale is the gradient to the scale from
// elsewhere, or null for none.
void daq_quantize_input_backward(
    const float* g, const float* grad_scale, const float* x, float* out, int64_t n, const float* lower,
    const float* upper, const float* scale, const float* zero_point, float* grad_lower, float* grad_upper, float top,
    const Slope* slope, int kind, int threads) {
  const int64_t blocks = (n + BLOCK - 1) / BLOCK;
  const float s = *scale, z = *zero_point;
  std::vector<double> sums(blocks);
#pragma omp parallel for num_threads(used(threads, n)) schedule(static)
  for (int64_t b = 0; b < blocks; b++) {
    const int64_t from = b * BLOCK, size = n - from < BLOCK ? n - from : BLOCK;
    sums[b] = with_slope<InputBackward>(kind, g + from, x + from, out + from, size, s, z, top, slope);
  }
  double total = 0.0;
  for (double sum : sums) total += sum;
  total = (grad_scale ? *grad_scale : 0.0) - total / s;
  const float share = s * top > TINY ? static_cast<float>(total / top) : 0.0f;  // a range of no width has no gradient
  *grad_lower = !lower || *lower > 0.0f ? 0.0f : -share;
  *grad_upper = *upper < 0.0f ? 0.0f : share;
}

// operand = codes - zero_point
void daq_expand_input(const uint8_t* codes, float* out, int64_t n, const float* zero_point, int threads) {
  const int64_t blocks = (n + BLOCK - 1) / BLOCK;
  const float z = *zero_point;
#pragma omp parallel for num_threads(used(threads, n)) schedule(static)
  for (int64_t b = 0; b < blocks; b++) {
    const int64_t from = b * BLOCK, to = n - from < BLOCK ? n : from + BLOCK;
#pragma omp simd
    for (int64_t i = from; i < to; i++) out[i] = static_cast<float>(codes[i]) - z;
  }
}

// A 64-bit fingerprint of a weight and its bounds; lower is null where it follows from upper.
uint64_t daq_fingerprint(
    const float* x, int64_t n, const float* lower, const float* upper, int64_t bounds, int threads) {
  const int64_t blocks = (n + BLOCK - 1) / BLOCK;
  std::vector<uint64_t> parts(blocks);
#pragma omp parallel for num_threads(used(threads, n)) schedule(static)
  for (int64_t b = 0; b < blocks; b++)
    parts[b] = fingerprint_block(x + b * BLOCK, n - b * BLOCK < BLOCK ? n - b * BLOCK : BLOCK);
  uint64_t out = static_cast<uint64_t>(n);
  for (uint64_t part : parts) out = mix(out, part);
  if (lower) out = mix(out, fingerprint_block(lower, bounds));
  return mix(out, fingerprint_block(upper, bounds));
}

// Operand (unless out is null) and codes of a weight. mean is null where the weight is not normalized; lower is read
// only where the weight is normalized.
void daq_quantize_weight(
    const float* w, float* out, uint8_t* codes, const int64_t* view, const float* lower, const float* upper,
    const float* mean, const float* std, float low, float top, int midrise, int threads) {
  const Rows rows(view);
  const WeightGrid p{lower, upper, mean, std, low, top, midrise != 0};
  const int64_t tasks = rows.tasks();
#pragma omp parallel for num_threads(used(threads, rows.elements())) schedule(static)
  for (int64_t t = 0; t < tasks; t++) {
    const int64_t at = rows.begin(t), n = rows.size(t), c = rows.channel(t);
    float* operand = out ? out + at : nullptr;
    if (mean && midrise)
      weight_block<true, true>(w + at, operand, codes + at, n, p, c);
    else if (mean)
      weight_block<true, false>(w + at, operand, codes + at, n, p, c);
    else if (midrise)
      weight_block<false, true>(w + at, operand, codes + at, n, p, c);
    else
      weight_block<false, false>(w + at, operand, codes + at, n, p, c);
  }
}

// Gradients to a weight and to its bounds; grad_lower is null where lower is -upper or is not read.
void daq_quantize_weight_backward(
    const float* g, const float* w, float* out, const int64_t* view, const float* lower, const float* upper,
    const float* mean, const float* std, float* grad_lower, float* grad_upper, float low, float top, int midrise,
    const Slope* slope, int kind, int threads) {
  const Rows rows(view);
  const WeightGrid p{lower, upper, mean, std, low, top, midrise != 0};
  const int64_t tasks = rows.tasks();
  std::vector<double> sums(2 * tasks), plain(rows.channels()), times(rows.channels());
#pragma omp parallel for num_threads(used(threads, rows.elements())) schedule(static)
  for (int64_t t = 0; t < tasks; t++) {
    const int64_t at = rows.begin(t);
    const int64_t n = rows.size(t), c = rows.channel(t);
    double* sum = &sums[2 * t];
    if (mean && midrise)
      with_slope<Weight<true, true>::Backward>(kind, g + at, w + at, out + at, n, &p, c, slope, sum);
    else if (mean)
      with_slope<Weight<true, false>::Backward>(kind, g + at, w + at, out + at, n, &p, c, slope, sum);
    else if (midrise)
      with_slope<Weight<false, true>::Backward>(kind, g + at, w + at, out + at, n, &p, c, slope, sum);
    else
      with_slope<Weight<false, false>::Backward>(kind, g + at, w + at, out + at, n, &p, c, slope, sum);
  }
  for (int64_t t = 0; t < tasks; t++) {
    plain[rows.channel(t)] += sums[2 * t];
    times[rows.channel(t)] += sums[2 * t + 1];
  }
  for (int64_t i = 0; i < rows.channels(); i++) {
    const double scale = weight_scale(p, i);
    const bool alive = (midrise ? upper[i] - weight_lower(p, i) : upper[i]) >= TINY;
    const double of_top = alive ? -times[i] / scale / top : 0.0;  // to upper, through scale
    const double of_shift = midrise ? -plain[i] / scale : 0.0;     // to lower, as the offset
    if (mean) {
      if (grad_lower) grad_lower[i] = static_cast<float>(of_shift - of_top);
      grad_upper[i] = static_cast<float>(of_top);
    } else {
      grad_upper[i] = static_cast<float>(midrise ? 2.0 * of_top - of_shift : of_top);  // lower is -upper
    }
  }
}

// out = (codes * step + offset) * scale of the channel, without the scale where it is null.
void daq_expand_weight(
    const uint8_t* codes, float* out, const int64_t* view, float step, float offset, const float* scale,
    int per_channel, int threads) {
  const Rows rows(view);
  const int64_t tasks = rows.tasks();
#pragma omp parallel for num_threads(used(threads, rows.elements())) schedule(static)
  for (int64_t t = 0; t < tasks; t++) {
    const int64_t at = rows.begin(t), n = rows.size(t);
    const float s = scale ? scale[per_channel ? rows.channel(t) : 0] : 1.0f;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) out[at + i] = (static_cast<float>(codes[at + i]) * step + offset) * s;
  }
}

// grad_scale = sum(g * operand) per channel, or over all elements; g *= scale, in place.
void daq_scale_weight_gradient(
    float* g, const uint8_t* codes, const int64_t* view, float step, float offset, const float* scale,
    float* grad_scale, int per_channel, int threads) {
  const Rows rows(view);
  const int64_t tasks = rows.tasks();
  std::vector<double> sums(tasks), total(per_channel ? rows.channels() : 1);
#pragma omp parallel for num_threads(used(threads, rows.elements())) schedule(static)
  for (int64_t t = 0; t < tasks; t++) {
    const int64_t n = rows.size(t);
    float* row = g + rows.begin(t);
    const uint8_t* code = codes + rows.begin(t);
    const float s = scale[per_channel ? rows.channel(t) : 0];
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) {
      sum += row[i] * (static_cast<float>(code[i]) * step + offset);
      row[i] *= s;
    }
    sums[t] = sum;
  }
  for (int64_t t = 0; t < tasks; t++) total[per_channel ? rows.channel(t) : 0] += sums[t];
  for (size_t i = 0; i < total.size(); i++) grad_scale[i] = static_cast<float>(total[i]);
}

// The sum scale: total = |output_scale| * weight scale * input scale. The weight scale is max(upper, 0) / top, or
// weight_step where upper is null; the input scale is *step, or input_step where step is null.
void daq_combine_scale(
    const float* output_scale, const float* upper, const float* step, float* total, int64_t n, float top,
    float weight_step, float input_step) {
  const float of_input = step ? *step : input_step;
  for (int64_t i = 0; i < n; i++) {
    const float of_weight = upper ? (upper[i] < 0.0f ? 0.0f : upper[i]) / top : weight_step;
    total[i] = std::fabs(output_scale[i]) * of_weight * of_input;
  }
}

// Gradients of daq_combine_scale to output_scale and step; the gradient to upper is added to grad_upper.
void daq_combine_scale_backward(
    const float* grad, const float* output_scale, const float* upper, const float* step, float* grad_scale,
    float* grad_upper, float* grad_step, int64_t n, float top, float weight_step, float input_step) {
  const double of_input = step ? *step : input_step;
  double sum = 0.0;
  for (int64_t i = 0; i < n; i++) {
    const double of_weight = upper ? (upper[i] < 0.0f ? 0.0f : upper[i]) / top : weight_step;
    const double size = std::fabs(output_scale[i]), sign = (output_scale[i] > 0.0f) - (output_scale[i] < 0.0f);
    grad_scale[i] = static_cast<float>(grad[i] * of_weight * of_input * sign);
    if (upper && upper[i] > 0.0f) grad_upper[i] += static_cast<float>(grad[i] * size * of_input / top);
    sum += grad[i] * size * of_weight;
  }
  *grad_step = static_cast<float>(sum);
}

// out = acc * scale + bias over (outer, channels, inner). bias may be null; scale has one element, or one per channel.
void daq_rescale(
    const float* acc, float* out, int64_t outer, int64_t channels, int64_t inner, const float* scale, int per_channel,
    const float* bias, int threads) {
  const int64_t n = outer * channels * inner;
  if (inner == 1) {  // the channel is last
#pragma omp parallel for num_threads(used(threads, n)) schedule(static)
    for (int64_t o = 0; o < outer; o++) {
      const float* a = acc + o * channels;
      float* y = out + o * channels;
#pragma omp simd
      for (int64_t c = 0; c < channels; c++) y[c] = a[c] * scale[per_channel ? c : 0];
      if (!bias) continue;
#pragma omp simd
      for (int64_t c = 0; c < channels; c++) y[c] = y[c] + bias[c];
    }
    return;
  }
#pragma omp parallel for num_threads(used(threads, n)) schedule(static)
  for (int64_t r = 0; r < outer * channels; r++) {
    const int64_t c = r % channels;
    const float* a = acc + r * inner;
    float* y = out + r * inner;
    const float s = scale[per_channel ? c : 0];
    if (bias) {
      const float b = bias[c];
#pragma omp simd
      for (int64_t i = 0; i < inner; i++) y[i] = a[i] * s + b;
    } else {
#pragma omp simd
      for (int64_t i = 0; i < inner; i++) y[i] = a[i] * s;
    }
  }
}

// From integer sums of products to the output, as the real values of its codes: see functional/integer.py. NaN stays NaN.
void daq_requantize(
    const float* acc, float* out, int64_t outer, int64_t channels, int64_t inner, const int32_t* factor,
    const int32_t* bias, const float* m, float low, float high, float scale, int threads) {
  const int64_t n = outer * channels * inner;
  if (inner == 1) {  // the channel is last
#pragma omp parallel for num_threads(used(threads, n)) schedule(static)
    for (int64_t o = 0; o < outer; o++) {
      const float* a = acc + o * channels;
      float* y = out + o * channels;
#pragma omp simd
      for (int64_t c = 0; c < channels; c++) {
        const float total = static_cast<float>(static_cast<int32_t>(a[c]) * factor[c] + bias[c]);
        const float value = clip(std::rint(total * m[c]), low, high) * scale;
        y[c] = a[c] == a[c] ? value : a[c];
      }
    }
    return;
  }
#pragma omp parallel for num_threads(used(threads, n)) schedule(static)
  for (int64_t r = 0; r < outer * channels; r++) {
    const int32_t f = factor[r % channels], b = bias[r % channels];
    const float by = m[r % channels];
    const float* a = acc + r * inner;
    float* y = out + r * inner;
#pragma omp simd
    for (int64_t i = 0; i < inner; i++) {
      const float total = static_cast<float>(static_cast<int32_t>(a[i]) * f + b);
      const float value = clip(std::rint(total * by), low, high) * scale;
      y[i] = a[i] == a[i] ? value : a[i];
    }
  }
}

}  // extern "C"
