// Work dealt to threads. No torch, no link to an OpenMP runtime.
#pragma once
#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace beft {

// Runs work(i) for i in [0, n), dealt in contiguous runs. The threads are those of the OpenMP
// runtime that the process has loaded already (torch's), found by name: a pool of our own would
// fight for the processors with torch's threads, which spin for a while after their work.
// Where there is none, threads are made for the call.
template <typename Work>
void parallel(int64_t n, int threads, const Work& work) {
  using Start = void (*)(void (*)(void*), void*, unsigned, unsigned);
  static const Start start = reinterpret_cast<Start>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));

  struct Team {
    const Work& work;
    int64_t n, parts;
    std::atomic<int64_t> next{0};
    // Which thread takes which part is chance; no result may depend on it.
    static void join(void* self) {
      Team& team = *static_cast<Team*>(self);
      for (int64_t part; (part = team.next++) < team.parts;)
        for (int64_t i = team.n * part / team.parts; i < team.n * (part + 1) / team.parts; ++i)
          team.work(i);
    }
  };
  Team team{work, n, std::max<int64_t>(1, std::min<int64_t>(threads, n))};
  if (team.parts == 1) return Team::join(&team);
  if (start) return start(&Team::join, &team, static_cast<unsigned>(team.parts), 0);
  std::vector<std::thread> others;
  for (int64_t i = 1; i < team.parts; ++i) others.emplace_back(&Team::join, &team);
  Team::join(&team);
  for (auto& thread : others) thread.join();
}

}  // namespace beft
