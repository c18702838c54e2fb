#include "ops/cca_mix.h"

#include "cpu/gemm.h"

namespace blockdraft::cpu::BLOCKDRAFT_ISA {
namespace {

constexpr int64_t kRows = 16;                // rows of a task
constexpr int64_t kMaxHead = 256;            // head dimensions a task has room for
constexpr float kNormFloor = 1.1920929e-7f;  // as transformers in float32: a zero head stays zero

// u of a row's ancestors: the parent's row, or the committed state.
template <class T>
struct Ancestors {
  const T *parent, *grandparent;

  Ancestors(const CcaMixParams& p, int64_t row) {
    const int64_t C = (p.Hq + p.Hkv) * p.D, width = C + p.Hkv * p.D;
    const T* qkv = static_cast<const T*>(p.qkv);
    const T* state = static_cast<const T*>(p.conv_states) + p.row_states[row] * 2 * C;
    const int64_t parent_row = p.row_parents[row];
    const int64_t grandparent_row = parent_row < 0 ? -1 : p.row_parents[parent_row];
    parent = parent_row < 0 ? state + C : qkv + parent_row * width;
    grandparent = grandparent_row >= 0 ? qkv + grandparent_row * width : parent_row < 0 ? state : state + C;
  }
};

// m' and m of one head beside each other: the row that the grouped convolution's matrix reads.
template <class T>
void mix_depthwise(const CcaMixParams& p, int64_t row, int64_t head, const T* u, float* mixed) {
  const int64_t C = (p.Hq + p.Hkv) * p.D, first = head * p.D;
  const Ancestors<T> before(p, row);
  const float *older = p.conv_qk_depthwise + first, *newer = older + C, *bias = p.conv_depthwise_bias + first;
  for (int64_t d = 0; d < p.D; ++d) {
    const float u0 = widen(u[first + d]), u1 = widen(before.parent[first + d]);
    mixed[d] = older[d] * widen(before.grandparent[first + d]) + newer[d] * u1 + bias[d];
    mixed[p.D + d] = older[d] * u1 + newer[d] * u0 + bias[d];
  }
}

// y += the mean of the raw projections that belongs to the head.
template <class T>
void add_mean(const CcaMixParams& p, int64_t head, const T* u, float* y) {
  const int64_t G = p.Hq / p.Hkv;
  const T* keys = u + p.Hq * p.D;
  if (head < p.Hq) {
    for (int64_t d = 0; d < p.D; ++d) y[d] += 0.5f * (widen(u[head * p.D + d]) + widen(keys[head / G * p.D + d]));
    return;
  }
  const int64_t h = head - p.Hq;
  for (int64_t d = 0; d < p.D; ++d) {
    float sum = 0;
    for (int64_t j = 0; j < G; ++j) sum += 0.5f * (widen(u[(h * G + j) * p.D + d]) + widen(keys[h * p.D + d]));
    y[d] += sum / static_cast<float>(G);
  }
}

void normalise(float* y, int64_t D, float scale) {
  float sums[kLanes] = {};
  for (int64_t d = 0; d < D; ++d) sums[d % kLanes] += y[d] * y[d];
  float sum = 0;
  for (float s : sums) sum += s;
  const float factor = __builtin_sqrtf(static_cast<float>(D)) / maximum(__builtin_sqrtf(sum), kNormFloor) * scale;
  for (int64_t d = 0; d < D; ++d) y[d] *= factor;
}

void rotate(float* y, const float* cosines, int64_t half) {
  const float* sines = cosines + half;
  for (int64_t i = 0; i < half; ++i) {
    const float low = y[i], high = y[half + i];
    y[i] = low * cosines[i] - high * sines[i];
    y[half + i] = high * cosines[i] + low * sines[i];
  }
}

template <class T>
void mix_head(const CcaMixParams& p, int64_t head, int64_t first, int64_t rows) {
  const int64_t C = (p.Hq + p.Hkv) * p.D, width = C + p.Hkv * p.D, panels = blocks(p.D, kPanel);
  const T* qkv = static_cast<const T*>(p.qkv);
  float* mixed = p.mixed + (head * p.T + first) * 2 * p.D;
  for (int64_t r = 0; r < rows; ++r) mix_depthwise(p, first + r, head, qkv + (first + r) * width, mixed + r * 2 * p.D);

  // Grouped convolution.
  float y[kRows][kMaxHead];
  const T* weight = static_cast<const T*>(p.conv_qk_grouped) + head * panels * p.D * kPair;
  const float* bias = p.conv_grouped_bias + head * p.D;
  for (int64_t panel = 0; panel < panels; ++panel)
    multiply_panel(mixed, 2 * p.D, rows, weight + panel * p.D * kPair, p.D, [&](int64_t r, const Vec(&total)[2]) {
      float* out = y[r] + panel * kPanel;
      const int64_t n = minimum(kPanel, p.D - panel * kPanel);
      store_panel(out, total, n);
      for (int64_t c = 0; c < n; ++c) out[c] += bias[panel * kPanel + c];
    });

  // Means, norm, rotation.
  const bool is_query = head < p.Hq;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row = first + r;
    add_mean(p, head, qkv + row * width, y[r]);
    normalise(y[r], p.D, is_query ? 1.0f : p.temp[head - p.Hq]);
    rotate(y[r], p.rotary + row * 2 * p.half_rotary, p.half_rotary);
    T* out = is_query ? static_cast<T*>(p.q) + (row * p.Hq + head) * p.D
                      : static_cast<T*>(p.k) + (row * p.Hkv + head - p.Hq) * p.D;
    for (int64_t d = 0; d < p.D; ++d) narrow(y[r][d], out + d);
  }
}

template <class T>
void store_row(const CcaMixParams& p, int64_t row) {
  const int64_t C = (p.Hq + p.Hkv) * p.D, width = C + p.Hkv * p.D, half = p.Hkv * p.D / 2;
  const T* current = static_cast<const T*>(p.qkv) + row * width + C;
  const int64_t parent = p.row_parents[row];
  const T* delayed = parent < 0 ? static_cast<const T*>(p.recurrent_states) + p.row_states[row] * half
                                : static_cast<const T*>(p.qkv) + parent * width + C + half;
  T* v = static_cast<T*>(p.v) + row * 2 * half;
  for (int64_t i = 0; i < half; ++i) v[i] = current[i], v[half + i] = delayed[i];

  if (p.row_slots[row] < 0) return;
  const int64_t page = p.row_slots[row] / p.page_size, offset = p.row_slots[row] % p.page_size;
  const int64_t tiles = p.page_size / kPanel, k_size = kPanel * p.D, v_size = kPanel * blocks(p.D, kPanel) * kPanel;
  for (int64_t h = 0; h < p.Hkv; ++h) {
    const int64_t tile = (page * p.Hkv + h) * tiles + offset / kPanel;
    write_key(static_cast<const T*>(p.k) + (row * p.Hkv + h) * p.D, static_cast<T*>(p.k_pages) + tile * k_size,
              offset % kPanel, p.D);
    write_value(v + h * p.D, static_cast<T*>(p.v_pages) + tile * v_size, offset % kPanel, p.D);
  }
}

}  // namespace

void cca_mix_rotary(const CcaMixParams& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    float* cosines = p.rotary + row * 2 * p.half_rotary;
    for (int64_t i = 0; i < p.half_rotary; ++i) {
      const float angle = static_cast<float>(p.row_positions[row]) * p.inverse_frequencies[i];
      cosines[i] = __builtin_cosf(angle);
      cosines[p.half_rotary + i] = __builtin_sinf(angle);
    }
  }
}

void cca_mix(const CcaMixParams& p, int64_t begin, int64_t end) {
  const int64_t row_blocks = blocks(p.T, kRows);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t head = task / row_blocks, first = task % row_blocks * kRows, rows = minimum(kRows, p.T - first);
    if (p.dtype == DType::kBFloat16)
      mix_head<BFloat16>(p, head, first, rows);
    else
      mix_head<float>(p, head, first, rows);
  }
}

void cca_mix_store(const CcaMixParams& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    if (p.dtype == DType::kBFloat16)
      store_row<BFloat16>(p, row);
    else
      store_row<float>(p, row);
  }
}

}  // namespace blockdraft::cpu::BLOCKDRAFT_ISA
