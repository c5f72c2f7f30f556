// One whole chunk of all five MLP memories in float32, forward and backward, as one kernel per head and sequence: the
// mathematics of pieces.py (joint_piece) for the default rule, box by box, so that all that stands between two products
// stays in the cache. The backward computes the chunk again and keeps nothing but inputs and outputs.
//
// C tokens (16, 32 or 64), N width, E hidden width (multiples of 16). Boxes: eta, alpha, k, v, mem. `d` before a name:
// gradient with respect to it. Tested against pieces.py in tests/memory/test_cpu_piece.py. Built by cpu_products.py.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <string>
#include <tuple>

#include "cpu_chunk_backward.h"

namespace {

using namespace hope;

// A stack of tensors [H, (M,) B, …] or, for initial states, [H, (M,) …].
struct Place {
  int64_t heads, batch, width, hidden;

  Weights at(const at::Tensor& w2, const at::Tensor& w1, const at::Tensor& w1s, int64_t h, int64_t b, int64_t batch) const {
    Weights found;
    found.w2 = w2.const_data_ptr<float>() + (h * batch + b) * BOXES * hidden * width;
    for (int m = 0; m < MATRICES; m++)
      found.w1[m] = w1.const_data_ptr<float>() + ((h * MATRICES + m) * batch + b) * width * hidden;
    for (int s = 0; s < SCALARS; s++) found.w1s[s] = w1s.const_data_ptr<float>() + ((h * SCALARS + s) * batch + b) * hidden;
    return found;
  }
  Changes to(at::Tensor& w2, at::Tensor& w1, at::Tensor& w1s, int64_t h, int64_t b, int64_t batch) const {
    const Weights found = at(w2, w1, w1s, h, b, batch);
    Changes result;
    result.w2 = const_cast<float*>(found.w2);
    for (int m = 0; m < MATRICES; m++) result.w1[m] = const_cast<float*>(found.w1[m]);
    for (int s = 0; s < SCALARS; s++) result.w1s[s] = const_cast<float*>(found.w1s[s]);
    return result;
  }
};

struct Problem {
  Rule rule;
  Place place;
  int64_t tokens;
  at::Tensor z, q;

  int64_t scratch() const {  // floats: more than Chunk takes (checked by Arena)
    const int64_t widest = std::max(place.width, place.hidden), half = tokens * widest;
    return 170 * half + 16 * tokens * tokens + 40 * widest * widest + 100 * tokens + 4096;
  }
  const float* z_at(int64_t h, int64_t b) const { return z.const_data_ptr<float>() + h * z.stride(0) + b * z.stride(1); }
  const float* q_at(int64_t h, int64_t b) const { return q.const_data_ptr<float>() + h * q.stride(0) + b * q.stride(1); }
};

at::Tensor rows(const at::Tensor& x) { return x.stride(3) == 1 ? x : x.contiguous(); }

Problem problem(const at::Tensor& z, const at::Tensor& q, const at::Tensor& w2, const at::Tensor& w1, const at::Tensor& w1s,
                double eta_max, double eta_bias, double alpha_bias, double factor, double clamp, bool normalize_v,
                bool normalize_q) {
  TORCH_CHECK(z.dim() == 4 && w2.dim() == 4 && w1.dim() == 5 && w1s.dim() == 5 && z.sizes() == q.sizes(), "hope::piece: shapes");
  const Place place{z.size(0), z.size(1), z.size(3), w1.size(4)};
  const int64_t tokens = z.size(2);
  TORCH_CHECK((tokens == 16 || tokens == 32 || tokens == 64) && place.width % LANES == 0 && place.hidden % LANES == 0 &&
                  w2.size(2) == BOXES * place.hidden && w1.size(1) == MATRICES && w1s.size(1) == SCALARS,
              "hope::piece: shapes ", z.sizes(), " and ", w2.sizes());
  for (const at::Tensor& x : {z, q, w2, w1, w1s}) TORCH_CHECK(x.scalar_type() == at::kFloat, "hope::piece: float32 only");
  const Rule rule{float(eta_max), float(eta_bias), float(alpha_bias), float(factor), float(clamp), normalize_v, normalize_q};
  return {rule, place, tokens, rows(z), rows(q)};
}

void norms(const Weights& init, int64_t width, int64_t hidden, float* out) {
  for (int p = 0; p < BOXES; p++) {
    const float* w2 = init.w2 + p * hidden * width;
    out[p] = std::sqrt(dot(w2, w2, hidden * width));
    const float* w1 = p < SCALARS ? init.w1s[p] : init.w1[p - SCALARS];
    out[BOXES + p] = std::sqrt(dot(w1, w1, p < SCALARS ? hidden : hidden * width));
  }
}

using Pieces = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// (o [H, B, C, N], w2, w1 and w1s after the chunk, factors of the clamps [H, B, 10]).
Pieces piece(const at::Tensor& z, const at::Tensor& q, const at::Tensor& w2_, const at::Tensor& w1_, const at::Tensor& w1s_,
             const at::Tensor& init_w2, const at::Tensor& init_w1, const at::Tensor& init_w1s, double eta_max,
             double eta_bias, double alpha_bias, double factor, double clamp, bool normalize_v, bool normalize_q) {
  const at::Tensor w2 = w2_.contiguous(), w1 = w1_.contiguous(), w1s = w1s_.contiguous();
  const at::Tensor i2 = init_w2.contiguous(), i1 = init_w1.contiguous(), is = init_w1s.contiguous();
  const Problem p = problem(z, q, w2, w1, w1s, eta_max, eta_bias, alpha_bias, factor, clamp, normalize_v, normalize_q);
  const int64_t batch = p.place.batch, width = p.place.width, hidden = p.place.hidden;
  at::Tensor o = at::empty({p.place.heads, batch, p.tokens, width}, z.options());
  at::Tensor n2 = at::empty(w2.sizes(), z.options()), n1 = at::empty(w1.sizes(), z.options());
  at::Tensor ns = at::empty(w1s.sizes(), z.options());
  at::Tensor factors = at::empty({p.place.heads, batch, 2 * BOXES}, z.options());
  at::parallel_for(0, p.place.heads, 1, [&](int64_t first, int64_t last) {
    Arena &kept = scratch(0, 10 * width * hidden + 4096), &arena = scratch(1, p.scratch());
    for (int64_t h = first; h < last; h++) {
      kept.clear();
      Weights init = p.place.at(i2, i1, is, h, 0, 1);
      init.turn(width, hidden, kept);
      float init_norms[2 * BOXES];
      norms(init, width, hidden, init_norms);
      for (int64_t b = 0; b < batch; b++) {
        arena.clear();
        Weights now = p.place.at(w2, w1, w1s, h, b, batch);
        now.turn(width, hidden, arena);
        const Changes to = p.place.to(n2, n1, ns, h, b, batch);
        float* scales = factors.mutable_data_ptr<float>() + (h * batch + b) * 2 * BOXES;
        Chunk chunk(p.rule, p.tokens, width, hidden, now, init, arena);
        chunk.begin(p.z_at(h, b), p.z.stride(2));
        for (int box = 0; box < BOXES; box++) {
          const int64_t mark = arena.mark();
          const Box x = chunk.box<false>(box);
          chunk.commit(box, x, to, init_norms, scales);
          if (box == MEM) {
            chunk.ask(x, p.q_at(h, b), p.q.stride(2));
            chunk.answer(x, o.mutable_data_ptr<float>() + (h * batch + b) * p.tokens * width);
          }
          arena.back_to(mark);
        }
      }
    }
  });
  return {o, n2, n1, ns, factors};
}

using PieceGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// Gradients of z, q, w2, w1, w1s and of the three initial states.
PieceGradients piece_backward(const at::Tensor& d_o_, const at::Tensor& d_n2_, const at::Tensor& d_n1_, const at::Tensor& d_ns_,
                              const at::Tensor& z, const at::Tensor& q, const at::Tensor& w2_, const at::Tensor& w1_,
                              const at::Tensor& w1s_, const at::Tensor& init_w2, const at::Tensor& init_w1,
                              const at::Tensor& init_w1s, const at::Tensor& n2, const at::Tensor& n1, const at::Tensor& ns,
                              const at::Tensor& factors, double eta_max, double eta_bias, double alpha_bias, double factor,
                              double clamp, bool normalize_v, bool normalize_q) {
  const at::Tensor w2 = w2_.contiguous(), w1 = w1_.contiguous(), w1s = w1s_.contiguous();
  const at::Tensor i2 = init_w2.contiguous(), i1 = init_w1.contiguous(), is = init_w1s.contiguous();
  const at::Tensor d_o = d_o_.contiguous(), d_n2 = d_n2_.contiguous(), d_n1 = d_n1_.contiguous(), d_ns = d_ns_.contiguous();
  const Problem p = problem(z, q, w2, w1, w1s, eta_max, eta_bias, alpha_bias, factor, clamp, normalize_v, normalize_q);
  const int64_t batch = p.place.batch, width = p.place.width, hidden = p.place.hidden;
  at::Tensor d_z = at::empty({p.place.heads, batch, p.tokens, width}, z.options()), d_q = at::empty_like(d_z);
  at::Tensor g2 = at::empty(w2.sizes(), z.options()), g1 = at::empty(w1.sizes(), z.options());
  at::Tensor gs = at::empty(w1s.sizes(), z.options()), s2 = at::zeros(i2.sizes(), z.options());
  at::Tensor s1 = at::zeros(i1.sizes(), z.options()), ss = at::zeros(is.sizes(), z.options());
  at::parallel_for(0, p.place.heads, 1, [&](int64_t first, int64_t last) {
    Arena &kept = scratch(0, 10 * width * hidden + 4096), &arena = scratch(1, p.scratch());
    for (int64_t h = first; h < last; h++) {
      kept.clear();
      Weights init = p.place.at(i2, i1, is, h, 0, 1);
      init.turn(width, hidden, kept);
      float init_norms[2 * BOXES];
      norms(init, width, hidden, init_norms);
      const Changes shared = p.place.to(s2, s1, ss, h, 0, 1);
      for (int64_t b = 0; b < batch; b++) {
        arena.clear();
        Weights now = p.place.at(w2, w1, w1s, h, b, batch);
        now.turn(width, hidden, arena);
        const Weights after = p.place.at(n2, n1, ns, h, b, batch), d_after = p.place.at(d_n2, d_n1, d_ns, h, b, batch);
        const float* scales = factors.const_data_ptr<float>() + (h * batch + b) * 2 * BOXES;
        const int64_t at = (h * batch + b) * p.tokens * width;
        Chunk chunk(p.rule, p.tokens, width, hidden, now, init, arena);
        chunk.begin(p.z_at(h, b), p.z.stride(2));
        chunk.begin_backward(p.place.to(g2, g1, gs, h, b, batch), shared);
        for (int box = MEM; box >= 0; box--) {
          const int64_t mark = arena.mark();
          const Box x = chunk.box<true>(box);
          if (box == MEM) {
            chunk.ask(x, p.q_at(h, b), p.q.stride(2));
            chunk.answer_backward(x, d_o.const_data_ptr<float>() + at, d_q.mutable_data_ptr<float>() + at);
          }
          chunk.box_backward(box, x, after, d_after, scales, init_norms);
          arena.back_to(mark);
        }
        chunk.end_backward(d_z.mutable_data_ptr<float>() + at);
      }
    }
  });
  return {d_z, d_q, g2, g1, gs, s2, s1, ss};
}

constexpr const char* SETTINGS =
    "float eta_max, float eta_bias, float alpha_bias, float factor, float clamp, bool normalize_v, bool normalize_q";

}  // namespace

TORCH_LIBRARY_FRAGMENT(hope, library) {
  const std::string inputs = "Tensor z, Tensor q, Tensor w2, Tensor w1, Tensor w1s, Tensor init_w2, Tensor init_w1, Tensor init_w1s, ";
  const std::string before = "piece_backward(Tensor d_o, Tensor d_w2, Tensor d_w1, Tensor d_w1s, ";
  const std::string made = "Tensor new_w2, Tensor new_w1, Tensor new_w1s, Tensor factors, ";
  const std::string five = ") -> (Tensor, Tensor, Tensor, Tensor, Tensor";
  library.def(("piece(" + inputs + SETTINGS + five + ")").c_str());
  library.def((before + inputs + made + SETTINGS + five + ", Tensor, Tensor, Tensor)").c_str());
}
TORCH_LIBRARY_IMPL(hope, CPU, library) {
  library.impl("piece", piece);
  library.impl("piece_backward", piece_backward);
}
