#pragma once

// Reads tensors and batch norms out of Python's objects, without a call into PyTorch for each: a cell has hundreds.

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <vector>

#include "rnas/tables.h"

namespace rnas::bind {

namespace py = pybind11;

// What is used of DLPack's C exchange API, https://dmlc.github.io/dlpack, version 1.
namespace dlpack {

struct Version {
  uint32_t major, minor;
};
struct Device {
  int32_t type, index;
};
struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct View {
  void* data;
  Device device;
  int32_t dimensions;
  DataType dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct ExchangeApi {
  Version version;
  ExchangeApi* previous;  // an older one, or null
  void *allocate, *from_object, *to_object;
  int (*view)(void* object, View* out);  // borrows from the object; not 0: a Python error is set
  void* stream;
};

constexpr int32_t kCpu = 1;
constexpr DataType kInt64{0, 64, 1}, kFloat32{2, 32, 1};

}  // namespace dlpack

// Tensors of float32 on the CPU. Holds their objects.
class Arrays {
 public:
  int64_t size() const { return size_; }  // elements of all together

  // All of them behind one another.
  void copy(uintptr_t out) const {
    cpu::concatenate(arrays_.data(), sizes_.data(), static_cast<int64_t>(sizes_.size()), reinterpret_cast<float*>(out));
  }

 private:
  friend class Reader;
  std::vector<py::object> owners_;
  std::vector<const float*> arrays_;
  std::vector<int64_t> sizes_;
  int64_t size_ = 0;
};

// Batch norms of one mode, eps and number of channels, without affine parameters. Holds the objects of their averages.
class Norms {
 public:
  bool on_batch = false;
  double eps = 0;
  py::list moved;  // the tensors that `update` writes

  // The running averages as tables (B, C).
  void averages(uintptr_t mean, uintptr_t variance) const {
    if (on_batch) throw std::logic_error("these norms take the statistics of the batch");
    const std::vector<int64_t> sizes(means_.size(), channels_);
    const auto count = static_cast<int64_t>(means_.size());
    cpu::concatenate(means_.data(), sizes.data(), count, reinterpret_cast<float*>(mean));
    cpu::concatenate(variances_.data(), sizes.data(), count, reinterpret_cast<float*>(variance));
  }

  // Moves the running averages. mean, variance (B, C): of the batch, the biased one; unbias as in rnas/tables.h.
  void update(uintptr_t mean, uintptr_t variance, double unbias) {
    for (size_t each = 0; each < moving_.size(); ++each) {
      moving_[each].batch_mean = reinterpret_cast<const float*>(mean) + rows_[each] * channels_;
      moving_[each].batch_variance = reinterpret_cast<const float*>(variance) + rows_[each] * channels_;
    }
    cpu::update_averages(moving_.data(), static_cast<int64_t>(moving_.size()), channels_, unbias);
  }

 private:
  friend class Reader;
  int64_t channels_ = 0, row_count_ = 0;
  std::vector<py::object> owners_;
  std::vector<const float*> means_, variances_;  // where the statistics are not the batch's
  std::vector<int64_t> rows_;
  std::vector<cpu::RunningAverages> moving_;
};

// Both readers return None for what is not usual in any way: another class or dtype, a hook, a shape that does not fit.
// Plain Python looks at it then.
class Reader {
 public:
  // exchange: torch.Tensor.__dlpack_c_exchange_api__. The classes: torch.Tensor, nn.Parameter, nn.BatchNorm2d.
  Reader(const py::capsule& exchange, py::object tensor, py::object parameter, py::object batch_norm);

  // groups: lists of tensors. shapes: for each group a list with a tuple for each tensor.
  py::object arrays(const py::list& groups, const py::list& shapes) const;

  py::object norms(const py::list& modules, int64_t channels) const;

 private:
  // The view of a dense tensor of that dtype on the CPU; false where it is not one.
  bool view(PyObject* object, dlpack::DataType dtype, dlpack::View& out) const;
  // The floats of a tensor of `channels` numbers, or null.
  float* row(PyObject* object, int64_t channels) const;
  bool read(PyObject* module, Norms& norms, bool first) const;

  const dlpack::ExchangeApi* exchange_;
  py::object tensor_, parameter_, batch_norm_;
};

}  // namespace rnas::bind
