// The arguments of bias_grad_stats and bias_example_grads, looked at in one go: checks of each
// fact from Python would cost more than the sums of a small bias.
#pragma once
#include <pybind11/pybind11.h>

#include "tensor_views.h"

namespace beft {

// grad_output and example_offsets (or None) as kernels take them.
class GradArguments {
 public:
  GradArguments(py::handle grad_output, py::handle offsets) {
    const bool packed = !offsets.is_none();
    fit_ = view_of(grad_output, dy_) && dy_.ndim == (packed ? 2 : 3) && held(dy_) &&
           (dy_.type_bits == 16 || (dy_.type_bits == 32 && dy_.type_code == FLOAT)) &&
           (dy_.type_code == FLOAT || dy_.type_code == BFLOAT) && !negative(grad_output);
    if (!fit_ || !packed) return;
    fit_ = view_of(offsets, offsets_) && offsets_.same_device(dy_) && offsets_.ndim == 1 &&
           offsets_.sizes[0] > 0 && offsets_.type_code == INT && offsets_.type_bits == 64 &&
           offsets_.contiguous() && held(offsets_) && !negative(offsets);
  }

  bool fit() const { return fit_; }
  int64_t batch() const { return offsets_.data ? offsets_.sizes[0] - 1 : dy_.sizes[0]; }
  int64_t width() const { return dy_.sizes[dy_.ndim - 1]; }

  // Whether `tensor` may be written: plain memory of this device, of fp32 or else of bf16.
  bool writes(py::handle tensor, bool bf16_too, TensorView& view) const {
    return view_of(tensor, view) && view.same_device(dy_) && held(view) && !negative(tensor) &&
           ((view.type_code == FLOAT && view.type_bits == 32) ||
            (bf16_too && view.type_code == BFLOAT && view.type_bits == 16));
  }

  // Whether memory of this tensor lies within that which grad_output spans.
  bool meets(const TensorView& view) const { return meet(dy_, view); }

  static bool meet(const TensorView& a, const TensorView& b) {
    return a.address() < b.address() + bytes(b) && b.address() < a.address() + bytes(a);
  }

  // data, dtype, batch, tokens, width, three strides, and the offsets' address (0: none); then
  // `written`.
  template <typename... Written>
  py::tuple with(Written... written) const {
    const bool packed = offsets_.data != nullptr;
    const int dtype = dy_.type_code == BFLOAT ? 1 : dy_.type_bits == 16 ? 2 : 0;
    const int64_t* strides = dy_.strides + (packed ? 0 : 1);
    return py::make_tuple(dy_.address(), dtype, batch(), dy_.sizes[packed ? 0 : 1], width(),
                          packed ? 0 : dy_.strides[0], strides[0], strides[1],
                          packed ? offsets_.address() : 0, written...);
  }

 private:
  static constexpr int INT = 0, FLOAT = 2, BFLOAT = 4;  // DLPack's type codes

  static bool held(const TensorView& view) { return view.data || view.elements() == 0; }
  static uint64_t bytes(const TensorView& view) { return view.reach() * view.type_bits / 8; }

  TensorView dy_{}, offsets_{};
  bool fit_;
};

// None where something does not fit: Python says what.
inline py::object stats_arguments(py::handle grad_output, py::handle offsets, py::handle sum,
                                  py::handle sum_sq) {
  const GradArguments own(grad_output, offsets);
  TensorView views[2]{};
  if (!own.fit()) return py::none();
  for (int i = 0; i < 2; ++i) {
    const TensorView& view = views[i];
    if (!own.writes(i ? sum_sq : sum, false, views[i]) || view.ndim != 1 ||
        view.sizes[0] != own.width() || !view.contiguous())
      return py::none();
  }
  if (GradArguments::meet(views[0], views[1])) return py::none();
  return own.with(views[0].address(), views[1].address());
}

// The same for rows, each in one piece and apart from the others: address, dtype, and elements
// from one row to the next.
inline py::object rows_arguments(py::handle grad_output, py::handle offsets, py::handle out) {
  const GradArguments own(grad_output, offsets);
  TensorView rows{};
  if (!own.fit() || !own.writes(out, true, rows) || rows.ndim != 2 ||
      rows.sizes[0] != own.batch() || rows.sizes[1] != own.width() || own.meets(rows))
    return py::none();
  const bool side_by_side = rows.sizes[1] == 1 || rows.strides[1] == 1;
  const bool apart = rows.sizes[0] == 1 || rows.strides[0] >= rows.sizes[1];
  if (!rows.contiguous() && !(side_by_side && apart)) return py::none();
  return own.with(rows.address(), rows.type_bits == 32 ? 0 : 1, rows.strides[0]);
}

}  // namespace beft
