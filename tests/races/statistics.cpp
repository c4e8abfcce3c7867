
// One call of each operator on a small input, from the seed that is the program's argument; fails
// where a number is not what the sums in double are.
int main(int, char** arguments) {
  emulator::chance.seed(std::atoi(arguments[1]));
  constexpr int64_t B = 9, T = 19, H = 4, chunks = 2;
  std::vector<float> dy(B * T * H), work(2 * B * chunks * H), out(3 * H), rows(B * H);
  for (size_t i = 0; i < dy.size(); ++i) dy[i] = float(i * 7 % 23) / 8 - 1;
  const auto stats = [&] {
    return beft_bias_grad_stats_cuda(dy.data(), 0, B, T, H, T * H, H, 1, nullptr, chunks, 2.0f,
                                     work.data(), &out[0], &out[H], &out[2 * H], nullptr);
  };
  const auto each = [&] {
    return beft_bias_example_grads_cuda(dy.data(), 0, B, T, H, T * H, H, 1, nullptr, chunks, 2.0f,
                                        work.data(), rows.data(), 0, H, nullptr);
  };
  if (stats() || each()) return 1;
  for (int64_t h = 0; h < H; ++h) {
    double grad = 0, squares = 0;
    for (int64_t i = 0; i < B; ++i) {
      double g = 0;
      for (int64_t t = 0; t < T; ++t) g += dy[(i * T + t) * H + h];
      grad += g;
      squares += 4 * g * g;
      if (!(std::fabs(rows[i * H + h] - 2 * g) <= 1e-4)) return 2;
    }
    if (!(std::fabs(out[h] - grad) <= 1e-4 && std::fabs(out[H + h] - 2 * grad) <= 1e-4 &&
          std::fabs(out[2 * H + h] - squares) <= 1e-3))
      return 3;
  }
  return 0;
}
