// Whole chunks in a row of all five MLP memories in float32, forward and backward, as one kernel per head and sequence:
// the mathematics of pieces.py (joint_piece) for the default rule, box by box, so that all that stands between two
// products stays in the cache, and what one chunk hands to the next or, backward, to the one before. The backward
// computes each chunk again; beside inputs, outputs and the states between chunks only what the main memory is asked is
// kept, which spares the most products for its size.
//
// C tokens (16, 32 or 64), N width, E hidden width (multiples of 16). Boxes: eta, alpha, k, v, mem. `d` before a name:
// gradient with respect to it. Tested against pieces.py in tests/memory/test_cpu_piece.py. Built by cpu_products.py.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <tuple>

#include "cpu_chunk_backward.h"

namespace {

using namespace hope;

// The stacks w2, w1, w1s: [H, (M,) B, …] or, for initial states, [H, (M,) …].
struct Stacks {
  at::Tensor w2, w1, w1s;
};

Stacks contiguous(const at::Tensor& w2, const at::Tensor& w1, const at::Tensor& w1s) {
  return {w2.contiguous(), w1.contiguous(), w1s.contiguous()};
}

struct Place {
  int64_t heads, batch, width, hidden;

  // Of several chunks: [chunks, H, …].
  Stacks empty(int64_t chunks, const at::TensorOptions& options) const {
    return {at::empty({chunks, heads, batch, BOXES * hidden, width}, options),
            at::empty({chunks, heads, MATRICES, batch, width, hidden}, options),
            at::empty({chunks, heads, SCALARS, batch, 1, hidden}, options)};
  }
  Weights at(const Stacks& from, int64_t chunk, int64_t h, int64_t b, int64_t batch) const {
    Weights found;
    h += chunk * heads;
    found.w2 = from.w2.const_data_ptr<float>() + (h * batch + b) * BOXES * hidden * width;
    for (int m = 0; m < MATRICES; m++)
      found.w1[m] = from.w1.const_data_ptr<float>() + ((h * MATRICES + m) * batch + b) * width * hidden;
    for (int s = 0; s < SCALARS; s++) found.w1s[s] = from.w1s.const_data_ptr<float>() + ((h * SCALARS + s) * batch + b) * hidden;
    return found;
  }
  static Changes writable(const Weights& from) {
    Changes result;
    result.w2 = const_cast<float*>(from.w2);
    for (int m = 0; m < MATRICES; m++) result.w1[m] = const_cast<float*>(from.w1[m]);
    for (int s = 0; s < SCALARS; s++) result.w1s[s] = const_cast<float*>(from.w1s[s]);
    return result;
  }
  // Room for one head and sequence; and the same, to read from.
  Changes room(Arena& arena) const {
    Changes result;
    result.w2 = arena.take(BOXES * hidden * width);
    for (float*& matrix : result.w1) matrix = arena.take(width * hidden);
    for (float*& row : result.w1s) row = arena.take(hidden);
    return result;
  }
  static Weights read(const Changes& changes) {
    Weights found;
    found.w2 = changes.w2;
    std::copy(std::begin(changes.w1), std::end(changes.w1), found.w1);
    std::copy(std::begin(changes.w1s), std::end(changes.w1s), found.w1s);
    return found;
  }
};

using Maybe = std::optional<at::Tensor>;

struct Problem {
  Rule rule;
  Place place;
  int64_t tokens, chunks;  // in a chunk; of them
  bool fresh;  // no weights are given: those of all sequences are the initial ones
  at::Tensor z, q;
  Stacks now, init;

  int64_t scratch() const {  // floats: more than Chunk takes (checked by Arena)
    const int64_t widest = std::max(place.width, place.hidden), half = tokens * widest;
    return 170 * half + 16 * tokens * tokens + 40 * widest * widest + 100 * tokens + 4096;
  }
  // Where token t of a sequence stands.
  const float* z_at(int64_t h, int64_t b, int64_t t) const { return place_of(z, h, b, t); }
  const float* q_at(int64_t h, int64_t b, int64_t t) const { return place_of(q, h, b, t); }
  static const float* place_of(const at::Tensor& x, int64_t h, int64_t b, int64_t t) {
    return x.const_data_ptr<float>() + h * x.stride(0) + b * x.stride(1) + t * x.stride(2);
  }
  // The weights after a chunk: the last chunk's are tensors of their own, so that they do not hold on to all others.
  Weights after(int64_t chunk, int64_t h, int64_t b, const Stacks& between, const Stacks& end) const {
    return chunk + 1 < chunks ? place.at(between, chunk, h, b, place.batch) : place.at(end, 0, h, b, place.batch);
  }
  Weights before(int64_t chunk, int64_t h, int64_t b, const Stacks& between, const Weights& initial, Arena& arena) const {
    if (chunk == 0 && fresh) return initial;
    Weights found = chunk == 0 ? place.at(now, 0, h, b, place.batch) : place.at(between, chunk - 1, h, b, place.batch);
    found.turn(place.width, place.hidden, arena);
    return found;
  }
};

at::Tensor rows(const at::Tensor& x) { return x.stride(3) == 1 ? x : x.contiguous(); }

Problem problem(const at::Tensor& z, const at::Tensor& q, const Maybe& w2, const Maybe& w1, const Maybe& w1s,
                const at::Tensor& init_w2, const at::Tensor& init_w1, const at::Tensor& init_w1s, int64_t tokens,
                double eta_max, double eta_bias, double alpha_bias, double factor, double clamp, bool normalize_v,
                bool normalize_q) {
  const bool fresh = !w2 && !w1 && !w1s;
  TORCH_CHECK(z.dim() == 4 && z.sizes() == q.sizes() && init_w2.dim() == 3 && init_w1.dim() == 4 && init_w1s.dim() == 4 &&
                  (fresh || (w2 && w1 && w1s)),
              "hope::piece: shapes");
  const Place place{z.size(0), z.size(1), z.size(3), init_w1.size(3)};
  const int64_t heads = place.heads, batch = place.batch, width = place.width, hidden = place.hidden;
  using Sizes = at::IntArrayRef;
  bool fits = (tokens == 16 || tokens == 32 || tokens == 64) && z.size(2) > 0 && z.size(2) % tokens == 0 &&
              width % LANES == 0 && hidden % LANES == 0 && init_w2.sizes() == Sizes({heads, BOXES * hidden, width}) &&
              init_w1.sizes() == Sizes({heads, MATRICES, width, hidden}) &&
              init_w1s.sizes() == Sizes({heads, SCALARS, 1, hidden});
  if (!fresh)
    fits = fits && w2->sizes() == Sizes({heads, batch, BOXES * hidden, width}) &&
           w1->sizes() == Sizes({heads, MATRICES, batch, width, hidden}) &&
           w1s->sizes() == Sizes({heads, SCALARS, batch, 1, hidden});
  TORCH_CHECK(fits, "hope::piece: shapes ", z.sizes(), " and ", init_w2.sizes());
  Problem p{{float(eta_max), float(eta_bias), float(alpha_bias), float(factor), float(clamp), normalize_v, normalize_q},
            place, tokens, z.size(2) / tokens, fresh, rows(z), rows(q), {}, contiguous(init_w2, init_w1, init_w1s)};
  if (!fresh) p.now = contiguous(*w2, *w1, *w1s);
  for (const at::Tensor& x : {p.z, p.q, p.init.w2, p.init.w1, p.init.w1s, p.now.w2, p.now.w1, p.now.w1s})
    TORCH_CHECK(!x.defined() || x.scalar_type() == at::kFloat, "hope::piece: float32 only");
  return p;
}

void norms(const Weights& init, int64_t width, int64_t hidden, float* out) {
  for (int p = 0; p < BOXES; p++) {
    const float* w2 = init.w2 + p * hidden * width;
    out[p] = std::sqrt(dot(w2, w2, hidden * width));
    const float* w1 = p < SCALARS ? init.w1s[p] : init.w1[p - SCALARS];
    out[BOXES + p] = std::sqrt(dot(w1, w1, p < SCALARS ? hidden : hidden * width));
  }
}

using Pieces = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor,
                          at::Tensor>;

// (o [H, B, T, N]; w2, w1 and w1s after the last chunk; the same between chunks; factors of the clamps
// [H, B, chunks, 10]; what the main memory is asked [H, B, T, E], before its silu).
Pieces piece(const at::Tensor& z, const at::Tensor& q, const Maybe& w2, const Maybe& w1, const Maybe& w1s,
             const at::Tensor& init_w2, const at::Tensor& init_w1, const at::Tensor& init_w1s, int64_t tokens, double eta_max,
             double eta_bias, double alpha_bias, double factor, double clamp, bool normalize_v, bool normalize_q) {
  const Problem p = problem(z, q, w2, w1, w1s, init_w2, init_w1, init_w1s, tokens, eta_max, eta_bias, alpha_bias, factor,
                            clamp, normalize_v, normalize_q);
  const int64_t batch = p.place.batch, width = p.place.width, hidden = p.place.hidden;
  at::Tensor o = at::empty({p.place.heads, batch, p.chunks * tokens, width}, z.options());
  at::Tensor asked = at::empty({p.place.heads, batch, p.chunks * tokens, hidden}, z.options());
  at::Tensor factors = at::empty({p.place.heads, batch, p.chunks, 2 * BOXES}, z.options());
  const Stacks between = p.place.empty(p.chunks - 1, z.options()), ends = p.place.empty(1, z.options());
  const Stacks end{ends.w2[0], ends.w1[0], ends.w1s[0]};
  at::parallel_for(0, p.place.heads, 1, [&](int64_t first, int64_t last) {
    Arena &kept = scratch(0, 10 * width * hidden + 4096), &arena = scratch(1, p.scratch());
    for (int64_t h = first; h < last; h++) {
      kept.clear();
      Weights init = p.place.at(p.init, 0, h, 0, 1);
      init.turn(width, hidden, kept);
      float init_norms[2 * BOXES];
      norms(init, width, hidden, init_norms);
      for (int64_t b = 0; b < batch; b++)
        for (int64_t c = 0; c < p.chunks; c++) {
          arena.clear();
          const Weights now = p.before(c, h, b, between, init, arena);
          const Changes to = Place::writable(p.after(c, h, b, between, end));
          const int64_t part = (h * batch + b) * p.chunks + c, at = part * tokens;
          float* scales = factors.mutable_data_ptr<float>() + part * 2 * BOXES;
          Chunk chunk(p.rule, tokens, width, hidden, now, init, p.fresh && c == 0, arena);
          chunk.begin(p.z_at(h, b, c * tokens), p.z.stride(2));
          for (int box = 0; box < BOXES; box++) {
            const int64_t mark = arena.mark();
            const Box x = chunk.box<false>(box);
            chunk.commit(box, x, to, init_norms, scales);
            if (box == MEM) {
              chunk.ask<false>(x, p.q_at(h, b, c * tokens), p.q.stride(2), asked.mutable_data_ptr<float>() + at * hidden);
              chunk.answer(x, o.mutable_data_ptr<float>() + at * width);
            }
            arena.back_to(mark);
          }
        }
    }
  });
  return {o, end.w2, end.w1, end.w1s, between.w2, between.w1, between.w1s, factors, asked};
}

void fill(const Maybe& from, int64_t place, int64_t floats, float* to) {
  if (from) std::memcpy(to, from->const_data_ptr<float>() + place * floats, floats * sizeof(float));
  else std::memset(to, 0, floats * sizeof(float));
}

using PieceGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// Gradients of z, q, w2, w1, w1s (none where none were given) and of the three initial states, from those of the answers
// and of the last states (none: zeros).
PieceGradients piece_backward(const at::Tensor& d_o_, const Maybe& d_w2_, const Maybe& d_w1_, const Maybe& d_w1s_,
                              const at::Tensor& z, const at::Tensor& q, const Maybe& w2, const Maybe& w1, const Maybe& w1s,
                              const at::Tensor& init_w2, const at::Tensor& init_w1, const at::Tensor& init_w1s,
                              const at::Tensor& end_w2, const at::Tensor& end_w1, const at::Tensor& end_w1s,
                              const at::Tensor& between_w2, const at::Tensor& between_w1, const at::Tensor& between_w1s,
                              const at::Tensor& factors, const at::Tensor& asked, int64_t tokens, double eta_max,
                              double eta_bias, double alpha_bias, double factor, double clamp, bool normalize_v,
                              bool normalize_q) {
  const Problem p = problem(z, q, w2, w1, w1s, init_w2, init_w1, init_w1s, tokens, eta_max, eta_bias, alpha_bias, factor,
                            clamp, normalize_v, normalize_q);
  const at::Tensor d_o = d_o_.contiguous();
  const auto whole = [](const Maybe& x) { return x ? Maybe(x->contiguous()) : x; };
  const Maybe d_w2 = whole(d_w2_), d_w1 = whole(d_w1_), d_w1s = whole(d_w1s_);
  const Stacks end = contiguous(end_w2, end_w1, end_w1s), between{between_w2, between_w1, between_w1s};
  const int64_t batch = p.place.batch, width = p.place.width, hidden = p.place.hidden;
  at::Tensor d_z = at::empty({p.place.heads, batch, p.chunks * tokens, width}, z.options()), d_q = at::empty_like(d_z);
  Stacks given, shared{at::zeros_like(p.init.w2), at::zeros_like(p.init.w1), at::zeros_like(p.init.w1s)};
  if (!p.fresh) {
    given = p.place.empty(1, z.options());
    given = {given.w2[0], given.w1[0], given.w1s[0]};
  }
  at::parallel_for(0, p.place.heads, 1, [&](int64_t first, int64_t last) {
    Arena &kept = scratch(0, 10 * width * hidden + 4096), &arena = scratch(1, p.scratch());
    Arena& handed = scratch(2, 20 * width * hidden + 4096);  // gradients, from one chunk to the one before
    handed.clear();
    Changes from = p.place.room(handed), onward = p.place.room(handed);
    for (int64_t h = first; h < last; h++) {
      kept.clear();
      Weights init = p.place.at(p.init, 0, h, 0, 1);
      init.turn(width, hidden, kept);
      float init_norms[2 * BOXES];
      norms(init, width, hidden, init_norms);
      const Changes to_init = Place::writable(p.place.at(shared, 0, h, 0, 1));
      for (int64_t b = 0; b < batch; b++) {
        fill(d_w2, h * batch + b, BOXES * hidden * width, from.w2);
        for (int m = 0; m < MATRICES; m++) fill(d_w1, (h * MATRICES + m) * batch + b, width * hidden, from.w1[m]);
        for (int s = 0; s < SCALARS; s++) fill(d_w1s, (h * SCALARS + s) * batch + b, hidden, from.w1s[s]);
        for (int64_t c = p.chunks - 1; c >= 0; c--) {
          arena.clear();
          const bool fresh = p.fresh && c == 0;
          const Weights now = p.before(c, h, b, between, init, arena), after = p.after(c, h, b, between, end);
          const int64_t part = (h * batch + b) * p.chunks + c, at = part * tokens;
          const float* scales = factors.const_data_ptr<float>() + part * 2 * BOXES;
          Chunk chunk(p.rule, tokens, width, hidden, now, init, fresh, arena);
          chunk.begin(p.z_at(h, b, c * tokens), p.z.stride(2));
          const Changes to = c > 0 ? onward : fresh ? to_init : Place::writable(p.place.at(given, 0, h, b, batch));
          chunk.begin_backward(to, to_init);
          for (int box = MEM; box >= 0; box--) {
            const int64_t mark = arena.mark();
            const Box x = chunk.box<true>(box);
            if (box == MEM) {
              chunk.ask<true>(x, p.q_at(h, b, c * tokens), p.q.stride(2), asked.const_data_ptr<float>() + at * hidden);
              chunk.answer_backward(x, d_o.const_data_ptr<float>() + at * width, d_q.mutable_data_ptr<float>() + at * width);
            }
            chunk.box_backward(box, x, after, Place::read(from), scales, init_norms);
            arena.back_to(mark);
          }
          chunk.end_backward(d_z.mutable_data_ptr<float>() + at * width);
          std::swap(from, onward);
        }
      }
    }
  });
  return {d_z, d_q, given.w2, given.w1, given.w1s, shared.w2, shared.w1, shared.w1s};
}

constexpr const char* SETTINGS =
    "int tokens, float eta_max, float eta_bias, float alpha_bias, float factor, float clamp, bool normalize_v, bool normalize_q";

}  // namespace

TORCH_LIBRARY_FRAGMENT(hope, library) {
  const std::string inputs = "Tensor z, Tensor q, Tensor? w2, Tensor? w1, Tensor? w1s, Tensor init_w2, Tensor init_w1, Tensor init_w1s, ";
  const std::string before = "piece_backward(Tensor d_o, Tensor? d_w2, Tensor? d_w1, Tensor? d_w1s, ";
  const std::string made = "Tensor end_w2, Tensor end_w1, Tensor end_w1s, Tensor between_w2, Tensor between_w1, "
                           "Tensor between_w1s, Tensor factors, Tensor asked, ";
  const std::string eight = ") -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor";
  library.def(("piece(" + inputs + SETTINGS + eight + ", Tensor)").c_str());
  library.def((before + inputs + made + SETTINGS + eight + ")").c_str());
}
TORCH_LIBRARY_IMPL(hope, CPU, library) {
  library.impl("piece", piece);
  library.impl("piece_backward", piece_backward);
}
