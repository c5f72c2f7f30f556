// What chunks are made of in float32, with 512-bit vectors: batched products C = A B of small matrices, and inverses of
// unit lower triangular ones.
//
// In a product A may have any strides (each of its elements is broadcast). B's rows must be contiguous, or its columns, which are
// then copied into rows panel by panel. Built and registered by cpu_products.py.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <immintrin.h>
#include <torch/library.h>

#include <vector>

namespace {

typedef float Vector __attribute__((vector_size(64), aligned(4)));
constexpr int64_t LANES = 16, PANEL = 64;

// ROWS x (16 COLUMNS) elements of C, held in registers over the whole inner dimension.
template <int ROWS, int COLUMNS>
inline void tile(const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t b_row, float* c,
                 int64_t c_row, int64_t inner) {
  Vector sum[ROWS][COLUMNS];
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < COLUMNS; v++) sum[r][v] = Vector{};
  for (int64_t k = 0; k < inner; k++) {
    Vector row[COLUMNS];
    for (int v = 0; v < COLUMNS; v++) row[v] = *reinterpret_cast<const Vector*>(b + k * b_row + LANES * v);
    for (int r = 0; r < ROWS; r++) {
      const float factor = a[r * a_row + k * a_column];
      for (int v = 0; v < COLUMNS; v++) sum[r][v] += factor * row[v];
    }
  }
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < COLUMNS; v++) *reinterpret_cast<Vector*>(c + r * c_row + LANES * v) = sum[r][v];
}

template <int COLUMNS>
void panel(const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t b_row, float* c, int64_t c_row,
           int64_t rows, int64_t inner) {
  int64_t r = 0;
  for (; r + 6 <= rows; r += 6)
    tile<6, COLUMNS>(a + r * a_row, a_row, a_column, b, b_row, c + r * c_row, c_row, inner);
  for (; r + 2 <= rows; r += 2)
    tile<2, COLUMNS>(a + r * a_row, a_row, a_column, b, b_row, c + r * c_row, c_row, inner);
  for (; r < rows; r++) tile<1, COLUMNS>(a + r * a_row, a_row, a_column, b, b_row, c + r * c_row, c_row, inner);
}

void panel_of(int64_t columns, const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t b_row,
              float* c, int64_t c_row, int64_t rows, int64_t inner) {
  switch (columns / LANES) {
    case 4: panel<4>(a, a_row, a_column, b, b_row, c, c_row, rows, inner); break;
    case 3: panel<3>(a, a_row, a_column, b, b_row, c, c_row, rows, inner); break;
    case 2: panel<2>(a, a_row, a_column, b, b_row, c, c_row, rows, inner); break;
    default: panel<1>(a, a_row, a_column, b, b_row, c, c_row, rows, inner);
  }
}

// b[k * PANEL + n] = source[n * stride + k] for 16 x 16 elements, in registers.
void transpose_block(const float* source, int64_t stride, float* b) {
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
    _mm512_storeu_ps(b + c * PANEL, _mm512_shuffle_f32x4(first, second, 0x88));
    _mm512_storeu_ps(b + (4 + c) * PANEL, _mm512_shuffle_f32x4(third, fourth, 0x88));
    _mm512_storeu_ps(b + (8 + c) * PANEL, _mm512_shuffle_f32x4(first, second, 0xdd));
    _mm512_storeu_ps(b + (12 + c) * PANEL, _mm512_shuffle_f32x4(third, fourth, 0xdd));
  }
}

void transpose(const float* source, int64_t stride, float* b, int64_t columns, int64_t inner) {
  int64_t k = 0;
  for (; k + LANES <= inner; k += LANES)
    for (int64_t n = 0; n < columns; n += LANES) transpose_block(source + n * stride + k, stride, b + k * PANEL + n);
  for (; k < inner; k++)
    for (int64_t n = 0; n < columns; n++) b[k * PANEL + n] = source[n * stride + k];
}

at::Tensor& bmm_out(const at::Tensor& a, const at::Tensor& b, at::Tensor& c) {
  TORCH_CHECK(a.dim() == 3 && b.dim() == 3 && a.size(0) == b.size(0) && a.size(2) == b.size(1),
              "hope::bmm: shapes ", a.sizes(), " and ", b.sizes());
  TORCH_CHECK(a.scalar_type() == at::kFloat && b.scalar_type() == at::kFloat, "hope::bmm: float32 only");
  TORCH_CHECK(b.size(2) % LANES == 0, "hope::bmm: columns ", b.size(2), " are no multiple of ", LANES);
  const at::Tensor right = b.stride(2) == 1 || b.stride(1) == 1 ? b : b.contiguous();
  const int64_t batch = a.size(0), rows = a.size(1), inner = a.size(2), columns = b.size(2);
  TORCH_CHECK(c.sizes() == at::IntArrayRef({batch, rows, columns}) && c.is_contiguous(), "hope::bmm: result ", c.sizes());
  const float *pa = a.const_data_ptr<float>(), *pb = right.const_data_ptr<float>();
  float* pc = c.mutable_data_ptr<float>();
  const bool turned = right.stride(2) != 1;
  at::parallel_for(0, batch, 1, [&](int64_t first, int64_t last) {
    std::vector<float> turned_panel(turned ? inner * PANEL : 0);
    for (int64_t i = first; i < last; i++)
      for (int64_t n = 0; n < columns; n += PANEL) {
        const int64_t width = std::min(PANEL, columns - n);
        const float* from = pb + i * right.stride(0) + n * right.stride(2);
        int64_t b_row = right.stride(1);
        if (turned) {
          transpose(from, right.stride(2), turned_panel.data(), width, inner);
          from = turned_panel.data();
          b_row = PANEL;
        }
        panel_of(width, pa + i * a.stride(0), a.stride(1), a.stride(2), from, b_row, pc + i * rows * columns + n,
                 columns, rows, inner);
      }
  });
  return c;
}

at::Tensor bmm(const at::Tensor& a, const at::Tensor& b) {
  TORCH_CHECK(a.dim() == 3 && b.dim() == 3, "hope::bmm: shapes ", a.sizes(), " and ", b.sizes());
  at::Tensor c = at::empty({a.size(0), a.size(1), b.size(2)}, a.options());
  return bmm_out(a, b, c);
}

// (I + L)^-1 by forward substitution: row i of the inverse is e_i - sum_{j < i} L_ij row j. Whatever stands on or above
// the diagonal of L is ignored.
template <int VECTORS>
void invert(const float* lower, float* inverse) {
  constexpr int64_t SIZE = LANES * VECTORS;
  for (int64_t i = 0; i < SIZE; i++) {
    Vector row[VECTORS];
    for (int v = 0; v < VECTORS; v++) row[v] = Vector{};
    row[i / LANES][i % LANES] = 1.0f;
    for (int64_t j = 0; j < i; j++) {
      const float factor = lower[i * SIZE + j];
      for (int v = 0; v < VECTORS; v++) row[v] -= factor * *reinterpret_cast<const Vector*>(inverse + j * SIZE + LANES * v);
    }
    for (int v = 0; v < VECTORS; v++) *reinterpret_cast<Vector*>(inverse + i * SIZE + LANES * v) = row[v];
  }
}

at::Tensor unit_lower_inverse(const at::Tensor& lower) {
  const int64_t size = lower.dim() < 2 ? 0 : lower.size(-1);
  TORCH_CHECK(lower.dim() >= 2 && lower.size(-2) == size && (size == 16 || size == 32 || size == 64) &&
                  lower.scalar_type() == at::kFloat,
              "hope::unit_lower_inverse: float32 matrices of 16, 32 or 64 rows, not ", lower.sizes());
  const at::Tensor from = lower.contiguous();
  at::Tensor inverse = at::empty(from.sizes(), from.options());
  const float* source = from.const_data_ptr<float>();
  float* target = inverse.mutable_data_ptr<float>();
  at::parallel_for(0, from.numel() / (size * size), 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i++) {
      const float* a = source + i * size * size;
      float* x = target + i * size * size;
      if (size == 64) invert<4>(a, x);
      else if (size == 32) invert<2>(a, x);
      else invert<1>(a, x);
    }
  });
  return inverse;
}

}  // namespace

TORCH_LIBRARY(hope, library) {
  library.def("bmm(Tensor a, Tensor b) -> Tensor");
  library.def("bmm.out(Tensor a, Tensor b, *, Tensor(a!) out) -> Tensor(a!)");
  library.def("unit_lower_inverse(Tensor lower) -> Tensor");
}
TORCH_LIBRARY_IMPL(hope, CPU, library) {
  library.impl("bmm", bmm);
  library.impl("bmm.out", bmm_out);
  library.impl("unit_lower_inverse", unit_lower_inverse);
}
