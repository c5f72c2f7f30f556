// Products of small float32 matrices with 512-bit vectors: what cpu_products.cpp and cpu_piece.cpp are made of.
//
// A may have any strides (each of its elements is broadcast), B and C have contiguous rows.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

namespace hope {

typedef float Vector __attribute__((vector_size(64), aligned(4)));
constexpr int64_t LANES = 16, PANEL = 64;

inline Vector load(const float* from) { return *reinterpret_cast<const Vector*>(from); }
inline void store(float* to, Vector value) { *reinterpret_cast<Vector*>(to) = value; }
inline float sum(Vector value) { return _mm512_reduce_add_ps(reinterpret_cast<__m512>(value)); }

// ROWS x (16 COLUMNS) elements of C, held in registers over the inner dimension from `first` to `last`. The loops are
// unrolled by name, early enough for GCC to see 24 registers: else it keeps an array on the stack before and after.
template <int ROWS, int COLUMNS, bool ADD>
inline void tile(const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t b_row, float* c,
                 int64_t c_row, int64_t first, int64_t last) {
  Vector total[ROWS][COLUMNS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
    for (int v = 0; v < COLUMNS; v++) total[r][v] = ADD ? load(c + r * c_row + LANES * v) : Vector{};
  for (int64_t k = first; k < last; k++) {
    Vector row[COLUMNS];
#pragma GCC unroll 8
    for (int v = 0; v < COLUMNS; v++) row[v] = load(b + k * b_row + LANES * v);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
      const float factor = a[r * a_row + k * a_column];
#pragma GCC unroll 8
      for (int v = 0; v < COLUMNS; v++) total[r][v] += factor * row[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
    for (int v = 0; v < COLUMNS; v++) store(c + r * c_row + LANES * v, total[r][v]);
}

template <int COLUMNS, bool ADD>
void panel(const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t b_row, float* c, int64_t c_row,
           int64_t rows, int64_t first, int64_t last) {
  int64_t r = 0;
  for (; r + 6 <= rows; r += 6)
    tile<6, COLUMNS, ADD>(a + r * a_row, a_row, a_column, b, b_row, c + r * c_row, c_row, first, last);
  for (; r + 4 <= rows; r += 4)
    tile<4, COLUMNS, ADD>(a + r * a_row, a_row, a_column, b, b_row, c + r * c_row, c_row, first, last);
  for (; r < rows; r++)
    tile<1, COLUMNS, ADD>(a + r * a_row, a_row, a_column, b, b_row, c + r * c_row, c_row, first, last);
}

// C (or with ADD: C plus) A B over the inner dimension from `first` to `last`; at most 64 columns, a multiple of 16.
template <bool ADD>
void product(int64_t columns, const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t b_row, float* c,
             int64_t c_row, int64_t rows, int64_t first, int64_t last) {
  switch (columns / LANES) {
    case 4: panel<4, ADD>(a, a_row, a_column, b, b_row, c, c_row, rows, first, last); break;
    case 3: panel<3, ADD>(a, a_row, a_column, b, b_row, c, c_row, rows, first, last); break;
    case 2: panel<2, ADD>(a, a_row, a_column, b, b_row, c, c_row, rows, first, last); break;
    default: panel<1, ADD>(a, a_row, a_column, b, b_row, c, c_row, rows, first, last);
  }
}

// b[k * b_row + n] = source[n * stride + k] for 16 x 16 elements, in registers.
inline void transpose_block(const float* source, int64_t stride, float* b, int64_t b_row) {
  __m512 row[16], half[16];
  for (int i = 0; i < 16; i++) row[i] = _mm512_loadu_ps(source + i * stride);
  for (int i = 0; i < 16; i += 2) {
    half[i] = _mm512_unpacklo_ps(row[i], row[i + 1]);
    half[i + 1] = _mm512_unpackhi_ps(row[i], row[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; j++) {
      const __m512d low = _mm512_castps_pd(half[i + j]), high = _mm512_castps_pd(half[i + 2 + j]);
      row[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      row[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  // row[4 g + c] now holds, in its four quarters q, column 4 q + c of the source rows 4 g to 4 g + 3
  for (int c = 0; c < 4; c++) {
    const __m512 first = _mm512_shuffle_f32x4(row[c], row[4 + c], 0x88);
    const __m512 second = _mm512_shuffle_f32x4(row[8 + c], row[12 + c], 0x88);
    const __m512 third = _mm512_shuffle_f32x4(row[c], row[4 + c], 0xdd);
    const __m512 fourth = _mm512_shuffle_f32x4(row[8 + c], row[12 + c], 0xdd);
    _mm512_storeu_ps(b + c * b_row, _mm512_shuffle_f32x4(first, second, 0x88));
    _mm512_storeu_ps(b + (4 + c) * b_row, _mm512_shuffle_f32x4(third, fourth, 0x88));
    _mm512_storeu_ps(b + (8 + c) * b_row, _mm512_shuffle_f32x4(first, second, 0xdd));
    _mm512_storeu_ps(b + (12 + c) * b_row, _mm512_shuffle_f32x4(third, fourth, 0xdd));
  }
}

// The first `columns` rows of `source`, `inner` long, as columns: b[k * b_row + n] = source[n * stride + k].
inline void transpose(const float* source, int64_t stride, float* b, int64_t b_row, int64_t columns, int64_t inner) {
  int64_t k = 0;
  for (; k + LANES <= inner; k += LANES)
    for (int64_t n = 0; n < columns; n += LANES) transpose_block(source + n * stride + k, stride, b + k * b_row + n, b_row);
  for (; k < inner; k++)
    for (int64_t n = 0; n < columns; n++) b[k * b_row + n] = source[n * stride + k];
}

// (I + L)^-1 by forward substitution: row i of the inverse is e_i - sum_{j < i} L_ij row j. Whatever stands on or above
// the diagonal of L is ignored. Four rows at a time, so that the processor need not wait for one sum.
constexpr int TOGETHER = 4;

template <int BLOCK, int VECTORS>
__attribute__((always_inline)) inline void eliminate(const float* lower, const float* inverse, int64_t i,
                                                     Vector (&row)[TOGETHER][VECTORS]) {
  constexpr int64_t SIZE = LANES * VECTORS;
  for (int64_t j = LANES * BLOCK; j < std::min(i, LANES * (BLOCK + 1)); j++)
#pragma GCC unroll 4
    for (int v = 0; v <= BLOCK; v++) {
      const Vector known = load(inverse + j * SIZE + LANES * v);
#pragma GCC unroll 4
      for (int r = 0; r < TOGETHER; r++) row[r][v] -= lower[(i + r) * SIZE + j] * known;
    }
  if constexpr (BLOCK + 1 < VECTORS)
    if (i > LANES * (BLOCK + 1)) eliminate<BLOCK + 1, VECTORS>(lower, inverse, i, row);
}

template <int VECTORS>
void invert(const float* lower, float* inverse) {
  constexpr int64_t SIZE = LANES * VECTORS;
  for (int64_t i = 0; i < SIZE; i += TOGETHER) {
    Vector row[TOGETHER][VECTORS];
#pragma GCC unroll 4
    for (int r = 0; r < TOGETHER; r++)
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v++) {
        const int64_t lane = i + r - LANES * v;
        const __mmask16 one = lane >= 0 && lane < LANES ? 1u << lane : 0;
        row[r][v] = reinterpret_cast<Vector>(_mm512_maskz_mov_ps(one, _mm512_set1_ps(1.0f)));
      }
    eliminate<0, VECTORS>(lower, inverse, i, row);
#pragma GCC unroll 4
    for (int r = 0; r < TOGETHER; r++) {
#pragma GCC unroll 4
      for (int s = 0; s < r; s++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) row[r][v] -= lower[(i + r) * SIZE + i + s] * row[s][v];
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v++) store(inverse + (i + r) * SIZE + LANES * v, row[r][v]);
    }
  }
}

inline void invert(int64_t size, const float* lower, float* inverse) {
  if (size == 64) invert<4>(lower, inverse);
  else if (size == 32) invert<2>(lower, inverse);
  else invert<1>(lower, inverse);
}

}  // namespace hope
