
// Two clipped steps of three tensors, one without a gradient, from the seed that is the program's
// argument; fails where norm, parameters, scores or counters are not what they must be.
int main(int, char** arguments) {
  emulator::chance.seed(std::atoi(arguments[1]));
  constexpr int64_t sizes[] = {37, 20, 26}, most = 8;
  constexpr double clip = 0.5, rate = 0.125;
  std::vector<std::vector<float>> params, grads;
  std::vector<beft::AdamWTensor> tensors;
  std::vector<beft::AdamWBlock> blocks;
  std::vector<int64_t> first{0};
  int64_t all = 0;
  double squares = 0;
  for (int64_t t = 0; t < 3; ++t) {
    params.emplace_back(sizes[t], 1.0f);
    grads.emplace_back(sizes[t]);
    for (int64_t i = 0; i < sizes[t]; ++i) {
      grads[t][i] = float(1 + i % 5) / 4;
      if (t != 1) squares += grads[t][i] * grads[t][i];
    }
    for (int64_t k = 0; k < sizes[t]; k += most)
      blocks.push_back({t, t, k, k, all + k, std::min(most, sizes[t] - k)});
    first.push_back(blocks.size());
    all += sizes[t];
  }
  for (int64_t t = 0; t < 3; ++t)
    tensors.push_back(
        {params[t].data(), t == 1 ? nullptr : grads[t].data(), 0, 0, sizes[t], sizes[t]});
  const int count = static_cast<int>(blocks.size());
  std::vector<float> state(3 * all), steps(3);
  std::fill(state.begin() + 2 * all, state.end(), 1.0f);
  std::vector<float4> scores(3), sums(count);
  std::vector<unsigned> counters(4);
  float norm = 0;
  const beft::AdamWGroup group{rate, 0.9, 0.999, 0.0, 0.0, 1.0};
  const beft_cuda::AdamWTables tables{blocks.data(),
                                      first.data(),
                                      state.data(),
                                      steps.data(),
                                      scores.data(),
                                      nullptr,
                                      nullptr,
                                      nullptr,
                                      nullptr,
                                      sums.data(),
                                      counters.data(),
                                      &norm,
                                      all,
                                      clip,
                                      count,
                                      3,
                                      3};
  for (int n = 1; n <= 2; ++n) {
    if (beft_cuda::bias_adamw_step(tensors.data(), &group, 1, tables, nullptr)) return 1;
    if (!(std::fabs(norm - std::sqrt(squares)) <= 1e-4)) return 2;
    for (int t = 0; t < 3; ++t) {
      const bool moves = t != 1;
      double change = 0, own = 0;
      for (int64_t i = 0; i < sizes[t]; ++i) {
        // Of equal gradients every step of AdamW is of the rate's length.
        const double want = moves ? 1 - n * rate : 1;
        if (!(std::fabs(params[t][i] - want) <= 1e-5)) return 3;
        change += 1 - want;
        own += grads[t][i] * grads[t][i];
      }
      if (steps[t] != (moves ? n : 0)) return 4;
      if (moves &&
          !(std::fabs(scores[t].x - change) <= 1e-4 && std::fabs(scores[t].w - own) <= 1e-4))
        return 5;
    }
    for (unsigned counter : counters)
      if (counter) return 6;
  }
  return 0;
}
