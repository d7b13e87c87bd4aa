#include "bind/objects.h"

namespace rnas::bind {

namespace {

// Attribute names, made once.
struct Names {
  py::str buffers{"_buffers"}, parameters{"_parameters"}, hooks{"_forward_hooks"}, pre_hooks{"_forward_pre_hooks"},
      forward{"forward"}, training{"training"}, eps{"eps"}, momentum{"momentum"}, features{"num_features"},
      track{"track_running_stats"}, weight{"weight"}, bias{"bias"}, mean{"running_mean"}, variance{"running_var"},
      batches{"num_batches_tracked"};
};

const Names& names() {
  static const Names* const made = new Names();  // never freed: Python may be gone by then
  return *made;
}

// Borrowed, or null.
PyObject* item(PyObject* dict, const py::str& name) {
  PyObject* found = PyDict_GetItemWithError(dict, name.ptr());
  if (!found) PyErr_Clear();
  return found;
}

bool is_empty_dict(PyObject* object) { return object && PyDict_Check(object) && PyDict_Size(object) == 0; }

// -1 for what is no such number.
int64_t number(PyObject* object) {
  if (!object || !PyLong_Check(object)) return -1;
  const int64_t found = PyLong_AsLongLong(object);
  if (found == -1) PyErr_Clear();
  return found;
}

bool has_shape(const dlpack::View& view, PyObject* shape) {
  if (!PyTuple_Check(shape) || PyTuple_GET_SIZE(shape) != view.dimensions) return false;
  for (int32_t each = 0; each < view.dimensions; ++each)
    if (number(PyTuple_GET_ITEM(shape, each)) != view.shape[each]) return false;
  return true;
}

}  // namespace

Reader::Reader(const py::capsule& exchange, py::object tensor, py::object parameter, py::object batch_norm)
    : exchange_(exchange.get_pointer<dlpack::ExchangeApi>()), tensor_(std::move(tensor)),
      parameter_(std::move(parameter)), batch_norm_(std::move(batch_norm)) {
  while (exchange_ && exchange_->version.major != 1) exchange_ = exchange_->previous;
  if (!exchange_ || !exchange_->view) throw std::invalid_argument("no DLPack exchange API of version 1");
}

bool Reader::view(PyObject* object, dlpack::DataType dtype, dlpack::View& out) const {
  const auto* const type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  if (type != tensor_.ptr() && type != parameter_.ptr()) return false;
  if (exchange_->view(object, &out)) {
    PyErr_Clear();
    return false;
  }
  if (out.device.type != dlpack::kCpu || out.byte_offset || out.dtype.code != dtype.code ||
      out.dtype.bits != dtype.bits || out.dtype.lanes != 1)
    return false;
  int64_t dense = 1;
  for (int32_t each = out.dimensions - 1; each >= 0; --each) {
    if (out.strides && out.shape[each] != 1 && out.strides[each] != dense) return false;
    dense *= out.shape[each];
  }
  return out.data || !dense;  // a tensor's memory may have been taken from it
}

float* Reader::row(PyObject* object, int64_t channels) const {
  dlpack::View found;
  const bool good = view(object, dlpack::kFloat32, found) && found.dimensions == 1 && found.shape[0] == channels;
  return good ? static_cast<float*>(found.data) : nullptr;
}

py::object Reader::arrays(const py::list& groups, const py::list& shapes) const {
  Arrays out;
  if (groups.size() != shapes.size()) return py::none();
  for (size_t group = 0; group < groups.size(); ++group) {
    PyObject *const tensors = PyList_GET_ITEM(groups.ptr(), group), *const expected = PyList_GET_ITEM(shapes.ptr(), group);
    if (!PyList_Check(tensors) || !PyList_Check(expected)) return py::none();
    const Py_ssize_t count = PyList_GET_SIZE(tensors);
    if (count != PyList_GET_SIZE(expected)) return py::none();
    for (Py_ssize_t each = 0; each < count; ++each) {
      PyObject* const tensor = PyList_GET_ITEM(tensors, each);
      dlpack::View found;
      if (!view(tensor, dlpack::kFloat32, found) || !has_shape(found, PyList_GET_ITEM(expected, each)))
        return py::none();
      int64_t size = 1;
      for (int32_t d = 0; d < found.dimensions; ++d) size *= found.shape[d];
      out.owners_.push_back(py::reinterpret_borrow<py::object>(tensor));
      out.arrays_.push_back(static_cast<const float*>(found.data));
      out.sizes_.push_back(size);
      out.size_ += size;
    }
  }
  return py::cast(std::move(out));
}

py::object Reader::norms(const py::list& modules, int64_t channels) const {
  Norms out;
  out.channels_ = channels;
  for (size_t each = 0; each < modules.size(); ++each)
    if (!read(PyList_GET_ITEM(modules.ptr(), each), out, each == 0)) return py::none();
  return py::cast(std::move(out));
}

bool Reader::read(PyObject* module, Norms& out, bool first) const {
  if (reinterpret_cast<PyObject*>(Py_TYPE(module)) != batch_norm_.ptr()) return false;
  const auto attributes = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(module, nullptr));
  if (!attributes) throw py::error_already_set();
  PyObject* const own = attributes.ptr();
  const Names& n = names();

  if (item(own, n.forward) || !is_empty_dict(item(own, n.hooks)) || !is_empty_dict(item(own, n.pre_hooks))) return false;
  PyObject *const buffers = item(own, n.buffers), *const parameters = item(own, n.parameters);
  if (!buffers || !parameters || !PyDict_Check(buffers) || !PyDict_Check(parameters)) return false;
  if (item(parameters, n.weight) != Py_None || item(parameters, n.bias) != Py_None) return false;

  PyObject *const training = item(own, n.training), *const track = item(own, n.track);
  PyObject *const eps = item(own, n.eps), *const momentum = item(own, n.momentum), *const features = item(own, n.features);
  if (!training || !PyBool_Check(training) || !track || !PyBool_Check(track) || !eps || !PyFloat_Check(eps)) return false;
  if (!momentum || !(momentum == Py_None || PyFloat_Check(momentum))) return false;
  if (number(features) != out.channels_) return false;
  PyObject *const mean = item(buffers, n.mean), *const variance = item(buffers, n.variance);
  PyObject* const batches = item(buffers, n.batches);
  if (!mean || !variance || !batches || (mean == Py_None) != (variance == Py_None)) return false;

  const bool on_batch = training == Py_True || mean == Py_None;
  if (first) {
    out.on_batch = on_batch;
    out.eps = PyFloat_AS_DOUBLE(eps);
  } else if (out.on_batch != on_batch || out.eps != PyFloat_AS_DOUBLE(eps)) {
    return false;
  }
  const int64_t row_index = out.row_count_++;
  if (mean == Py_None) return true;
  float *const means = row(mean, out.channels_), *const variances = row(variance, out.channels_);
  if (!means || !variances) return false;
  const auto hold = [&](PyObject* object) { out.owners_.push_back(py::reinterpret_borrow<py::object>(object)); };
  if (!on_batch) {
    hold(mean);
    hold(variance);
    out.means_.push_back(means);
    out.variances_.push_back(variances);
    return true;
  }
  // Without a counter an average of all batches does not move.
  if (track != Py_True || (batches == Py_None && momentum == Py_None)) return true;
  cpu::RunningAverages moving{means, variances, nullptr, -1.0, nullptr, nullptr};
  if (momentum != Py_None) {
    moving.momentum = PyFloat_AS_DOUBLE(momentum);
    if (!(moving.momentum >= 0)) return false;  // below 0 stands for None
  }
  out.moved.append(py::handle(mean));
  out.moved.append(py::handle(variance));
  if (batches != Py_None) {
    dlpack::View found;
    if (!view(batches, dlpack::kInt64, found) || found.dimensions != 0) return false;
    moving.batches = static_cast<int64_t*>(found.data);
    out.moved.append(py::handle(batches));
  }
  out.rows_.push_back(row_index);
  out.moving_.push_back(moving);
  return true;
}

}  // namespace rnas::bind
