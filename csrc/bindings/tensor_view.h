// A checked view of a torch tensor, read through DLPack's C exchange API: no torch library is linked, and
// one build serves every torch that has the API (2.10 and later).
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>
#include <string>

namespace loopmdm {

enum class DType { float32, float64, bfloat16, int32, int64, uint8, boolean };

constexpr int64_t kAny = -1;  // in an expected shape: any length

enum class Layout { contiguous, strided };  // strided: any strides but that of the last axis, which is 1

class TensorView {
 public:
  // Throws TypeError for something that is not a tensor with memory of its own or has another dtype, and
  // ValueError for another device, shape or layout; the message names the argument.
  TensorView(pybind11::handle object, const char* name, std::initializer_list<DType> dtypes,
             std::initializer_list<int64_t> shape, Layout layout = Layout::contiguous);

  DType dtype() const { return dtype_; }
  int64_t size(int axis) const { return shape_[axis]; }
  int64_t stride(int axis) const { return strides_[axis]; }  // in elements

  const void* data() const { return data_; }
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  static constexpr int kMaxRank = 4;

  void* data_;
  DType dtype_;
  int64_t shape_[kMaxRank], strides_[kMaxRank];
};

// Throw ValueError unless all values, of int64, are in 0..limit-1; unless there is a thread.
void check_range(const TensorView& values, const char* name, int64_t limit);
void check_num_threads(int num_threads);

}  // namespace loopmdm
