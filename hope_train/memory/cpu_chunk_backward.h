// The backward of cpu_chunk.h, box by box. `d_` before a name: the gradient with respect to it.

#pragma once

#include "cpu_chunk.h"

namespace hope {

// Backward. Gradients of weights go to `given` (of this sequence) and `shared` (initial states, of all sequences); where
// it is fresh, both are the latter.
inline void Chunk::begin_backward(const Changes& weights, const Changes& initial) {
  given = weights, shared = initial;
  for (float** part : {&d_v, &d_u}) *part = zeros(C * N);
  for (float** part : {&d_eta, &d_previous, &d_current, &d_left, &d_cum, &d_before}) *part = zeros(C);
  outer2 = zeros(C * C);
  d_k = arena.take(C * N), d_r2 = arena.take(C * E), d_r1 = arena.take(C * N), d_h = arena.take(C * E);
}

// Of the answers: d_q, and the first of what the weights, writes and keys of the main memory get.
inline void Chunk::answer_backward(const Box& x, const float* d_out, float* d_q_to) {
  const int64_t last = MEM - SCALARS;
  float *d_a = arena.take(C * E), *d_pairs = arena.take(C * C), *d_q = arena.take(C * N), *minus = arena.take(C * std::max(N, E));
  // through W1
  read_backward(N, E, d_out, hidden, now.w1[last], init.w1[last], given.w1[last], shared.w1[last], d_a, minus);
  score_backward(N, minus, x.r, score1, d_r1, d_pairs);
  lower_times<true>(C, E, d_pairs, x.h, d_a);
  upper_times<false>(C, E, d_pairs, hidden, d_h);
  // through silu and W2
  const int64_t at = MEM * E * N;
  each(C, E, [&](int64_t, int64_t i) { store(d_a + i, load(d_a + i) * load(hidden_slope + i)); });
  read_backward(E, N, d_a, q, now.w2 + at, init.w2 + at, given.w2 + at, shared.w2 + at, d_q, minus);
  each(C, N, [&](int64_t, int64_t i) { store(d_q + i, load(d_q + i) + load(d_out + i)); });
  score_backward(E, minus, r2, score2, d_r2, d_pairs);
  lower_times<true>(C, N, d_pairs, k, d_q);
  upper_times<false>(C, N, d_pairs, q, d_k);
  if (rule.normalize_q) normalise_backward(q, q_norm, d_q, d_q_to);
  else std::memcpy(d_q_to, d_q, C * N * sizeof(float));
}

// Of box p, from the gradients of its weights after the chunk.
inline void Chunk::box_backward(int p, const Box& x, const Weights& after_chunk, const Weights& d_after, const float* factors,
                  const float* init_norms) {
  const float kept = current[C - 1];
  const bool more = p == MEM;  // its answers came first
  float* d_new = arena.take(E * N);  // minus it, in fact: what the writes are taken off with
  float* d_new_turned = arena.take(E * N);
  float *d_b = arena.take(C * E), *d_pre = arena.take(C * E), *d_back = arena.take(C * E), *scaled = arena.take(C * E);
  // W2: what is left of it, and b^T u
  const int64_t at = p * E * N;
  unsettle(d_after.w2 + at, after_chunk.w2 + at, now.w2 + at, init.w2 + at, E * N, kept, factors[p], init_norms[p], more || fresh,
           d_new, given.w2 + at, shared.w2 + at);
  transpose(d_new, N, d_new_turned, E, E, N);
  multiply<false>(C, E, N, u, N, 1, d_new_turned, d_b);
  multiply<true>(C, N, E, x.b2, E, 1, d_new, d_u);
  if (p == MEM) {
    upper_times<false>(C, E, system2, d_r2, scaled);
    for (int64_t t = 0; t < C; t++) d_eta[t] += dot(scaled + t * E, x.b2 + t * E, E);
    each(C, E, [&](int64_t t, int64_t i) { store(d_b + i, load(d_b + i) + eta[t] * load(scaled + i)); });
    pairs<true>(C, E, scaled, r2, turned, outer2);
  }
  each(C, E, [&](int64_t t, int64_t i) {
    const Vector d = load(d_b + i), d_at = d * load(x.back + i) * load(x.bend + i);
    store(d_pre + i, fresh ? d + d_at : previous[t] * d + d_at);
    store(d_back + i, d * load(x.slope + i));
  });
  if (!fresh) {
    for (int64_t t = 0; t < C; t++) {
      Vector felt{};
      for (int64_t i = t * E; i < (t + 1) * E; i += LANES) {
        felt += load(d_b + i) * load(x.moved2 + i);
        store(scaled + i, (1.0f - previous[t]) * load(d_b + i));
      }
      d_previous[t] += sum(felt);
    }
    multiply<true>(C, N, E, scaled, E, 1, init.w2 + at, d_k);
    outer_sum<true>(C, E, N, scaled, k, shared.w2 + at);
  }
  // W1
  float *d_hidden = more ? d_h : arena.take(C * E), *d_hidden_v = arena.take(C * E), *d_rate = zeros(C), *left_h = scaled;
  if (p < SCALARS) scalar_backward(p, x, after_chunk, d_after, factors, init_norms, d_back, d_hidden, d_hidden_v, d_rate);
  else {
    const int m = p - SCALARS;
    unsettle(d_after.w1[m], after_chunk.w1[m], now.w1[m], init.w1[m], E * N, kept, factors[BOXES + p],
             init_norms[BOXES + p], more || fresh, d_new, given.w1[m], shared.w1[m]);
    float *d_r = more ? d_r1 : zeros(C * N), *solved = arena.take(C * N), *d_g = arena.take(C * N), *d_y = arena.take(C * N);
    transpose(d_new, E, d_new_turned, N, N, E);
    each(C, E, [&](int64_t t, int64_t i) { store(left_h + i, left[t] * load(x.h + i)); });
    multiply<true>(C, N, E, left_h, E, 1, d_new_turned, d_r);
    multiply<false>(C, E, N, x.r, N, 1, d_new, left_h);  // the gradient of left h
    for (int64_t t = 0; t < C; t++) {
      Vector felt{};
      for (int64_t i = t * E; i < (t + 1) * E; i += LANES) {
        const Vector d = load(left_h + i), onward = left[t] * d;
        felt += d * load(x.h + i);
        store(d_hidden + i, more ? load(d_hidden + i) + onward : onward);
      }
      d_left[t] += sum(felt);
    }
    upper_times<false>(C, N, x.system, d_r, solved);
    for (int64_t t = 0; t < C; t++) d_rate[t] += dot(solved + t * N, x.b1 + t * N, N);
    pairs<false>(C, N, solved, x.r, turned, lower);
    pairs_backward(x.a, x.rate, d_rate);
    // b = previous (W - W_init) h + W_init h + g
    float* d_init = d_r;
    each(C, N, [&](int64_t t, int64_t i) {
      const Vector d = x.rate[t] * load(solved + i);
      store(d_g + i, d);
      store(d_y + i, fresh ? d : previous[t] * d);
      store(d_init + i, (1.0f - previous[t]) * d);
    });
    if (!fresh) {
      for (int64_t t = 0; t < C; t++) d_previous[t] += x.rate[t] * dot(solved + t * N, x.y + t * N, N);
      multiply<true>(C, E, N, d_init, N, 1, init.w1[m], d_hidden);
      outer_sum<true>(C, N, E, d_init, x.h, shared.w1[m]);
    }
    // back = W1^T g
    multiply<true>(C, N, E, d_back, E, 1, now.w1_turned[m], d_g);
    outer_sum<true>(C, N, E, x.g, d_back, given.w1[m]);
    float* d_y_v = solved;
    each(C, N, [&](int64_t, int64_t i) {
      const Vector d = rule.factor * load(d_g + i);
      store(d_k + i, load(d_k + i) + d);
      store(d_v + i, load(d_v + i) - d);
      store(d_y + i, load(d_y + i) + d);
      store(d_y_v + i, -d);
    });
    multiply<true>(C, E, N, d_y, N, 1, now.w1[m], d_hidden);
    outer_sum<true>(C, N, E, d_y, x.h, given.w1[m]);
    multiply<false>(C, E, N, d_y_v, N, 1, now.w1[m], d_hidden_v);
    outer_sum<true>(C, N, E, d_y_v, x.hv, given.w1[m]);
  }
  both_times(C, E, lower, x.h, d_hidden);
  for (int64_t t = 0; t < C; t++) {
    // rate = eta / (1 + eta |h|^2)
    const float inverse = 1.0f / (1.0f + eta[t] * x.squares[t]), share = inverse * inverse * d_rate[t];
    d_eta[t] += share;
    const float grow = -2.0f * eta[t] * eta[t] * share;
    for (int64_t n = 0; n < E; n += LANES)
      store(d_hidden + t * E + n, load(d_hidden + t * E + n) + grow * load(x.h + t * E + n));
  }
  each(C, E, [&](int64_t, int64_t i) {
    store(d_pre + i, load(d_pre + i) + load(d_hidden + i) * load(x.slope + i));
    store(d_hidden_v + i, load(d_hidden_v + i) * load(x.slope_v + i));
  });
  multiply<true>(C, N, E, d_pre, E, 1, now.w2 + at, d_k);
  outer_sum<true>(C, E, N, d_pre, k, given.w2 + at);
  multiply<true>(C, N, E, d_hidden_v, E, 1, now.w2 + at, d_v);
  outer_sum<true>(C, E, N, d_hidden_v, v, given.w2 + at);
}

// Of what `begin` made, after all boxes.
inline void Chunk::end_backward(float* d_z) {
  float *d_c = arena.take(C * N), *scaled = arena.take(C * N), *d_values = arena.take(C * N);
  each(C, N, [&](int64_t t, int64_t i) { store(scaled + i, eta[t] * load(d_u + i)); });
  lower_times<false>(C, N, system2, scaled, d_c);
  for (int64_t t = 0; t < C; t++) {
    d_eta[t] += dot(d_u + t * N, y2 + t * N, N);
    d_left[t] += dot(d_c + t * N, k + t * N, N);
  }
  each(C, N, [&](int64_t t, int64_t i) { store(d_k + i, load(d_k + i) + left[t] * load(d_c + i)); });
  pairs<true>(C, N, y2, d_c, turned, outer2);
  lower = outer2;
  pairs_backward(a2, eta, d_eta);
  both_times(C, N, lower, k, d_k);
  // decays
  for (int64_t t = 0; t < C; t++) {
    d_before[t] += d_previous[t] * previous[t];
    d_cum[t] += d_current[t] * current[t] - d_left[t] * left[t];
    d_cum[C - 1] += d_left[t] * left[t];
  }
  float *d_raw[SCALARS] = {arena.take(C), arena.take(C)};
  float later = 0;
  for (int64_t t = C - 1; t >= 0; t--) {
    d_raw[ALPHA][t] = (later + d_cum[t]) * keep[t];  // before_t has the tokens up to t - 1 in it
    later += d_cum[t] + d_before[t];
    d_raw[ETA][t] = rule.eta_max > 0 ? d_eta[t] * eta[t] * (1.0f - eta[t] / rule.eta_max) : 0.0f;
  }
  std::memset(d_z, 0, C * N * sizeof(float));
  float* d_hidden = arena.take(C * E);
  for (int p = 0; p < MEM; p++) {
    if (p < SCALARS) {
      const float* w = now.w1s[p];
      for (int64_t t = 0; t < C; t++)
        for (int64_t n = 0; n < E; n += LANES) {
          store(d_hidden + t * E + n, d_raw[p][t] * load(w + n));
          store(given.w1s[p] + n, load(given.w1s[p] + n) + d_raw[p][t] * load(z_h[p] + t * E + n));
        }
    } else {
      const int m = p - SCALARS;
      if (p == K) normalise_backward(k, k_norm, d_k, d_values);
      else if (rule.normalize_v) normalise_backward(v, v_norm, d_v, d_values);
      else std::memcpy(d_values, d_v, C * N * sizeof(float));
      each(C, N, [&](int64_t, int64_t i) { store(d_z + i, load(d_z + i) + load(d_values + i)); });
      multiply<false>(C, E, N, d_values, N, 1, now.w1[m], d_hidden);
      outer_sum<true>(C, N, E, d_values, z_h[p], given.w1[m]);
    }
    each(C, E, [&](int64_t, int64_t i) { store(d_hidden + i, load(d_hidden + i) * load(z_slope[p] + i)); });
    multiply<true>(C, N, E, d_hidden, E, 1, now.w2 + p * E * N, d_z);
    outer_sum<true>(C, E, N, d_hidden, z, given.w2 + p * E * N);
  }
}

inline float* Chunk::zeros(int64_t floats) {
  float* start = arena.take(floats);
  std::memset(start, 0, floats * sizeof(float));
  return start;
}

inline void Chunk::normalise_backward(const float* out, const float* inverse, const float* d_out, float* d_x) {
  for (int64_t t = 0; t < C; t++) {
    const float along = dot(out + t * N, d_out + t * N, N);
    for (int64_t n = t * N; n < (t + 1) * N; n += LANES) store(d_x + n, inverse[t] * (load(d_out + n) - along * load(out + n)));
  }
}

// From the gradient of the clamped matrix minus that of the one before the clamp; what it gives to now (where there is
// `more`, in addition), init and decay.
inline void Chunk::unsettle(const float* d_clamped, const float* clamped, const float* from, const float* start, int64_t size,
              float kept, float factor, float init_norm, bool more, float* minus_d_new, float* d_now, float* d_init) {
  const float limit = rule.clamp * init_norm;
  const bool held = factor < 1.0f;
  float along = 0;  // of the gradient along the matrix, which the clamp gives to the limit instead
  if (held) {
    for (int64_t i = 0; i < size; i += LANES) along += sum(load(d_clamped + i) * load(clamped + i));
    along /= limit;
  }
  Vector moved{};
  for (int64_t i = 0; i < size; i += LANES) {
    const Vector first = load(start + i);
    Vector d = load(d_clamped + i);
    if (held) d = factor * (d - (along / limit) * load(clamped + i));
    store(minus_d_new + i, -d);
    store(d_now + i, more ? load(d_now + i) + kept * d : kept * d);
    Vector d_start = (1.0f - kept) * d;
    if (held) d_start += (rule.clamp * along / init_norm) * first;
    store(d_init + i, load(d_init + i) + d_start);
    moved += d * (load(from + i) - first);
  }
  d_current[C - 1] += sum(moved);
}

// Of reading x through a matrix on its way from now to init: d_x, what the matrices get, and minus d.
inline void Chunk::read_backward(int64_t rows, int64_t width, const float* d, const float* x, const float* from_now,
                                 const float* from_init, float* d_now, float* d_init, float* d_x, float* minus) {
  multiply<false>(C, width, rows, d, rows, 1, from_now, d_x);
  if (fresh) {
    outer_sum<true>(C, rows, width, d, x, d_init);
    each(C, rows, [&](int64_t, int64_t i) { store(minus + i, -load(d + i)); });
    return;
  }
  float *first = arena.take(C * width), *of_now = arena.take(C * rows), *of_init = arena.take(C * rows);
  multiply<false>(C, width, rows, d, rows, 1, from_init, first);
  for (int64_t t = 0; t < C; t++) {
    Vector total{};
    for (int64_t i = t * width; i < (t + 1) * width; i += LANES) {
      const Vector difference = load(d_x + i) - load(first + i);
      store(d_x + i, current[t] * difference + load(first + i));
      total += load(x + i) * difference;
    }
    d_current[t] += sum(total);
  }
  each(C, rows, [&](int64_t t, int64_t i) {
    store(of_now + i, current[t] * load(d + i));
    store(of_init + i, (1.0f - current[t]) * load(d + i));
    store(minus + i, -load(d + i));
  });
  outer_sum<false>(C, rows, width, of_now, x, d_now);
  outer_sum<true>(C, rows, width, of_init, x, d_init);
}

// Of (score) r with d given: d_r, and `d_pairs` becomes the gradient of q_i . x_j.
inline void Chunk::score_backward(int64_t width, const float* d, const float* r, const float* scores, float* d_r, float* d_pairs) {
  upper_times<false>(C, width, scores, d, d_r);
  pairs<false>(C, width, d, r, turned, d_pairs);
  Vector columns[4] = {};
  for (int64_t t = 0; t < C; t++) {
    Vector row{};
    for (int64_t j = 0; j <= t; j += LANES) {
      const Vector one = load(d_pairs + t * C + j), felt = one * load(scores + t * C + j);
      row += felt;
      columns[j / LANES] += felt;
      store(d_pairs + t * C + j, one * load(after + t * C + j));
    }
    d_cum[t] += sum(row);
  }
  for (int64_t j = 0; j < C; j += LANES) store(d_cum + j, load(d_cum + j) - columns[j / LANES]);
}

// `lower` holds solved y^T, minus the gradient of L = rate A; it becomes the gradient of x_i . x_j.
inline void Chunk::pairs_backward(const float* a, const float* rate, float* d_rate) {
  Vector columns[4] = {};
  for (int64_t t = 0; t < C; t++) {
    Vector row{};
    for (int64_t j = 0; j <= t; j += LANES) {
      const Vector one = -load(lower + t * C + j), felt = one * load(a + t * C + j);
      row += felt;
      columns[j / LANES] += rate[t] * felt;
      store(lower + t * C + j, rate[t] * one * load(ratio + t * C + j));
    }
    const float total = sum(row);
    d_rate[t] += total;
    d_before[t] += rate[t] * total;
  }
  for (int64_t j = 0; j < C; j += LANES) store(d_cum + j, load(d_cum + j) - columns[j / LANES]);
}

inline void Chunk::scalar_backward(int p, const Box& x, const Weights& after_chunk, const Weights& d_after, const float* factors,
                     const float* init_norms, const float* d_back, float* d_hidden, float* d_hidden_v, float* d_rate) {
  const float *w = now.w1s[p], *start = init.w1s[p];
  float *d_new = arena.take(E), *d_w = given.w1s[p], *d_start = shared.w1s[p], solved[64];
  unsettle(d_after.w1s[p], after_chunk.w1s[p], w, start, E, current[C - 1], factors[BOXES + p], init_norms[BOXES + p],
           fresh, d_new, d_w, d_start);
  for (int64_t t = 0; t < C; t++) {
    const float along = dot(x.h + t * E, d_new, E);
    solved[t] = left[t] * along;
    d_left[t] += x.r[t] * along;
    for (int64_t n = 0; n < E; n += LANES) store(d_hidden + t * E + n, x.r[t] * left[t] * load(d_new + n));
  }
  substitute_transposed(C, x.a, x.rate, solved);
  for (int64_t t = 0; t < C; t++) {
    d_rate[t] += solved[t] * x.b1[t];
    for (int64_t j = 0; j < C; j += LANES) store(lower + t * C + j, solved[t] * load(x.r + j));
  }
  pairs_backward(x.a, x.rate, d_rate);
  for (int64_t t = 0; t < C; t++) {
    const float d = x.rate[t] * solved[t], d_first = (1.0f - previous[t]) * d;
    d_previous[t] += d * x.y[t];
    const float d_target = rule.factor * (d + dot(d_back + t * E, w, E)), d_y = previous[t] * d + d_target;
    for (int64_t n = 0; n < E; n += LANES) {
      const int64_t i = t * E + n;
      store(d_w + n, load(d_w + n) + d_y * load(x.h + i) - d_target * load(x.hv + i) + x.g[t] * load(d_back + i));
      store(d_start + n, load(d_start + n) + d_first * load(x.h + i));
      store(d_hidden + i, load(d_hidden + i) + d_y * load(w + n) + d_first * load(start + n));
      store(d_hidden_v + i, -d_target * load(w + n));
    }
  }
}

}  // namespace hope
