// What a chunk is computed with: scratch memory, exp, dense products, products over pairs of tokens.

#pragma once

#include <c10/util/Exception.h>

#include <cstring>
#include <memory>
#include <new>

#include "cpu_tiles.h"

namespace hope {

// Memory for one head and sequence at a time, given out in turn and reused as a whole.
class Arena {
 public:
  explicit Arena(int64_t floats) : data_(new(std::align_val_t(64)) float[floats]), size_(floats) {}
  float* take(int64_t floats) {
    float* start = data_.get() + used_;
    used_ += (floats + LANES - 1) / LANES * LANES;
    TORCH_CHECK(used_ <= size_, "hope::piece: scratch memory is too small");
    return start;
  }
  void clear() { used_ = 0; }
  bool holds(int64_t floats) const { return floats <= size_; }
  int64_t mark() const { return used_; }
  void back_to(int64_t mark) { used_ = mark; }

 private:
  struct Delete {
    void operator()(float* p) const { operator delete[](p, std::align_val_t(64)); }
  };
  std::unique_ptr<float[], Delete> data_;
  int64_t size_, used_ = 0;
};

// A thread keeps its memory from call to call.
inline Arena& scratch(int which, int64_t floats) {
  thread_local std::unique_ptr<Arena> arenas[3];
  if (!arenas[which] || !arenas[which]->holds(floats)) arenas[which] = std::make_unique<Arena>(floats);
  return *arenas[which];
}

inline Vector exponential(Vector x) {
  // 2^n 2^f with f in [-1/2, 1/2]: 2^f by the polynomial of degree 6 with the least relative error (2e-9), 1 at 0; all
  // in all an error below 2 units in the last place
  const __m512 least = _mm512_set1_ps(-104.0f), most = _mm512_set1_ps(88.7f), scale = _mm512_set1_ps(1.44269504f);
  const __m512 in = _mm512_min_ps(_mm512_max_ps(reinterpret_cast<__m512>(x), least), most);
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(in, scale), 0);
  const __m512 f = _mm512_fmadd_ps(in, _mm512_set1_ps(1.92596303e-8f), _mm512_fmsub_ps(in, scale, n));
  __m512 sum = _mm512_set1_ps(1.53533618e-4f);
  for (const float term : {1.33988744e-3f, 9.61843736e-3f, 5.55033247e-2f, 0.240226479f, 0.693147203f, 1.0f})
    sum = _mm512_fmadd_ps(sum, f, _mm512_set1_ps(term));
  return reinterpret_cast<Vector>(_mm512_scalef_ps(sum, n));
}

inline Vector sigmoid(Vector x) {
  // a reciprocal to 14 bits and a step of Newton's, several times faster than a division and as exact
  const Vector sum = 1.0f + exponential(-x), guess = reinterpret_cast<Vector>(_mm512_rcp14_ps(reinterpret_cast<__m512>(sum)));
  return guess * (2.0f - sum * guess);
}

// out (or with ADD: out plus) a b for dense matrices: [rows, inner] [inner, columns]; b and out are contiguous.
template <bool ADD>
inline void multiply(int64_t rows, int64_t columns, int64_t inner, const float* a, int64_t a_row, int64_t a_column,
              const float* b, float* out) {
  for (int64_t n = 0; n < columns; n += PANEL)
    product<ADD>(std::min(PANEL, columns - n), a, a_row, a_column, b + n, columns, out + n, columns, rows, 0, inner);
}

// out = a^T b (or with ADD: plus) for a [tokens, rows], b [tokens, columns]: what a gives to the gradient of a matrix.
template <bool ADD>
inline void outer_sum(int64_t tokens, int64_t rows, int64_t columns, const float* a, const float* b, float* out) {
  multiply<ADD>(rows, columns, tokens, a, 1, rows, b, out);
}

// out_ij = a_i . b_j for j <= i and the rest of the diagonal's blocks of 16; `turned` has room for b transposed.
template <bool ADD>
inline void pairs(int64_t tokens, int64_t width, const float* a, const float* b, float* turned, float* out) {
  transpose(b, width, turned, tokens, tokens, width);
  for (int64_t r = 0; r < tokens; r += LANES)
    product<ADD>(r + LANES, a + r * width, width, 1, turned, tokens, out + r * tokens, tokens, LANES, 0, width);
}

// out = L b (or with ADD: plus) for L lower triangular with zeros above the diagonal in its blocks of 16.
template <bool ADD>
inline void lower_times(int64_t tokens, int64_t width, const float* lower, const float* b, float* out) {
  for (int64_t n = 0; n < width; n += PANEL)
    for (int64_t r = 0; r < tokens; r += LANES)
      product<ADD>(std::min(PANEL, width - n), lower + r * tokens, tokens, 1, b + n, width, out + r * width + n, width,
                   LANES, 0, r + LANES);
}

// out = L^T b (or with ADD: plus).
template <bool ADD>
inline void upper_times(int64_t tokens, int64_t width, const float* lower, const float* b, float* out) {
  for (int64_t n = 0; n < width; n += PANEL)
    for (int64_t r = 0; r < tokens; r += LANES)
      product<ADD>(std::min(PANEL, width - n), lower + r, 1, tokens, b + n, width, out + r * width + n, width, LANES, r,
                   tokens);
}

// out += (L + L^T) b: one dense product in place of two triangular ones. L becomes L + L^T.
inline void both_times(int64_t tokens, int64_t width, float* lower, const float* b, float* out) {
  float turned[LANES * LANES];
  for (int64_t r = 0; r < tokens; r += LANES) {
    float* diagonal = lower + r * tokens + r;
    for (int64_t c = 0; c < r; c += LANES) transpose_block(lower + r * tokens + c, tokens, lower + c * tokens + r, tokens);
    transpose_block(diagonal, tokens, turned, LANES);
    for (int64_t i = 0; i < LANES; i++) store(diagonal + i * tokens, load(diagonal + i * tokens) + load(turned + i * LANES));
  }
  multiply<true>(tokens, width, tokens, lower, tokens, 1, b, out);
}

inline float dot(const float* a, const float* b, int64_t width) {
  Vector total{};
  for (int64_t n = 0; n < width; n += LANES) total += load(a + n) * load(b + n);
  return sum(total);
}

// For each token t and all n: f(t, place of [t, n]) with vectors at the place.
template <typename F>
inline void each(int64_t tokens, int64_t width, F f) {
  for (int64_t t = 0; t < tokens; t++)
    for (int64_t n = 0; n < width; n += LANES) f(t, t * width + n);
}

// y of (I + rate A) y = y, in place, A zero from the diagonal on within its blocks.
inline void substitute(int64_t tokens, const float* a, const float* rate, float* y) {
  for (int64_t i = 1; i < tokens; i++) {
    Vector total{};
    for (int64_t j = 0; j < i; j += LANES) total += load(a + i * tokens + j) * load(y + j);
    y[i] -= rate[i] * sum(total);
  }
}

inline void substitute_transposed(int64_t tokens, const float* a, const float* rate, float* y) {
  for (int64_t i = tokens - 1; i >= 0; i--) {
    const float factor = rate[i] * y[i];
    for (int64_t j = 0; j < i; j += LANES) store(y + j, load(y + j) - factor * load(a + i * tokens + j));
  }
}

}  // namespace hope
