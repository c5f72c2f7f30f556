// What chunks are made of in float32, with 512-bit vectors: batched products C = A B of small matrices, and inverses of
// unit lower triangular ones.
//
// In a product A may have any strides (each of its elements is broadcast). B's rows must be contiguous, or its columns, which are
// then copied into rows panel by panel. Built and registered by cpu_products.py.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <vector>

#include "cpu_tiles.h"

namespace {

using hope::LANES;
using hope::PANEL;

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
          hope::transpose(from, right.stride(2), turned_panel.data(), PANEL, width, inner);
          from = turned_panel.data();
          b_row = PANEL;
        }
        hope::product<false>(width, pa + i * a.stride(0), a.stride(1), a.stride(2), from, b_row,
                             pc + i * rows * columns + n, columns, rows, 0, inner);
      }
  });
  return c;
}

at::Tensor bmm(const at::Tensor& a, const at::Tensor& b) {
  TORCH_CHECK(a.dim() == 3 && b.dim() == 3, "hope::bmm: shapes ", a.sizes(), " and ", b.sizes());
  at::Tensor c = at::empty({a.size(0), a.size(1), b.size(2)}, a.options());
  return bmm_out(a, b, c);
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
    for (int64_t i = first; i < last; i++) hope::invert(size, source + i * size * size, target + i * size * size);
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
