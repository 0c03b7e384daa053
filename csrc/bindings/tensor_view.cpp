#include "bindings/tensor_view.h"

#include <vector>

#include "bindings/dlpack_abi.h"

namespace py = pybind11;

namespace loopmdm {
namespace {

std::string type_name(py::handle object) { return Py_TYPE(object.ptr())->tp_name; }

const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::float32:
      return "float32";
    case DType::float64:
      return "float64";
    case DType::bfloat16:
      return "bfloat16";
    case DType::int32:
      return "int32";
    case DType::int64:
      return "int64";
    case DType::uint8:
      return "uint8";
    case DType::boolean:
      return "bool";
  }
  return "unknown";
}

dlpack::DataType dlpack_type(DType dtype) {
  switch (dtype) {
    case DType::float32:
      return {dlpack::kFloat, 32, 1};
    case DType::float64:
      return {dlpack::kFloat, 64, 1};
    case DType::bfloat16:
      return {dlpack::kBfloat, 16, 1};
    case DType::int32:
      return {dlpack::kInt, 32, 1};
    case DType::int64:
      return {dlpack::kInt, 64, 1};
    case DType::uint8:
      return {dlpack::kUInt, 8, 1};
    case DType::boolean:
      return {dlpack::kBool, 8, 1};
  }
  return {};
}

std::string describe(dlpack::DataType t) {
  const char* kind = t.code == dlpack::kInt      ? "int"
                     : t.code == dlpack::kUInt   ? "uint"
                     : t.code == dlpack::kFloat  ? "float"
                     : t.code == dlpack::kBfloat ? "bfloat"
                     : t.code == dlpack::kBool   ? "bool"
                                                 : nullptr;
  if (kind == nullptr) return "DLPack type code " + std::to_string(t.code);
  return t.code == dlpack::kBool ? kind : kind + std::to_string(t.bits);
}

std::string describe(const int64_t* values, size_t count) {
  std::string text = "[";
  for (size_t i = 0; i < count; ++i)
    text += (i ? ", " : "") + (values[i] == kAny ? std::string("any") : std::to_string(values[i]));
  return text + "]";
}

// The table of the object's type, or null. A tensor subclass that intercepts every operation (a fake or a
// wrapper tensor) inherits the table but has no memory behind it.
const dlpack::ExchangeApi* exchange_api(py::handle object) {
  struct Known {
    PyTypeObject* type = nullptr;
    const dlpack::ExchangeApi* api = nullptr;
  };
  static Known known[2];  // Tensor and Parameter
  PyTypeObject* type = Py_TYPE(object.ptr());
  for (const Known& k : known)
    if (type == k.type) return k.api;

  const py::object capsule = py::getattr(py::type::of(object), "__dlpack_c_exchange_api__", py::none());
  if (capsule.is_none()) return nullptr;
  auto* api =
      static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), dlpack::kCapsuleName));
  if (api == nullptr) throw py::error_already_set();
  while (api != nullptr && api->version.major != dlpack::kMajorVersion) api = api->previous;
  if (api == nullptr || api->view_of_object == nullptr) return nullptr;

  const py::object torch = py::module_::import("torch"), base = torch.attr("Tensor");
  const py::object own = py::getattr(py::type::of(object), "__torch_dispatch__", py::none());
  if (!own.is(base.attr("__torch_dispatch__"))) return nullptr;
  if (py::type::of(object).is(base)) known[0] = {type, api};
  if (py::type::of(object).is(torch.attr("nn").attr("Parameter"))) known[1] = {type, api};
  return api;
}

bool is_contiguous(const dlpack::Tensor& t) {
  if (t.strides == nullptr) return true;
  int64_t expected = 1;
  for (int32_t axis = t.rank - 1; axis >= 0; --axis) {
    if (t.shape[axis] == 0) return true;
    if (t.shape[axis] != 1 && t.strides[axis] != expected) return false;
    expected *= t.shape[axis];
  }
  return true;
}

}  // namespace

TensorView::TensorView(py::handle object, const char* name, std::initializer_list<DType> dtypes,
                       std::initializer_list<int64_t> shape, Layout layout) {
  const std::string where = std::string(name) + ": ";
  const dlpack::ExchangeApi* api = exchange_api(object);
  if (api == nullptr)
    throw py::type_error(where + "expected a torch.Tensor with memory of its own (torch >= 2.10), got " +
                         type_name(object));
  dlpack::Tensor t{};
  if (api->view_of_object(object.ptr(), &t) != 0) {
    py::error_already_set cause;
    throw py::value_error(where + "expected a dense tensor on the CPU; its memory cannot be read: " +
                          std::string(py::str(cause.value())));
  }

  if (t.device.type != dlpack::kCpu && t.device.type != dlpack::kCudaHost)
    throw py::value_error(where + "expected a tensor on the CPU, got one on device " +
                          std::string(py::str(object.attr("device"))));

  bool accepted = false;
  std::string names;
  for (const DType dtype : dtypes) {
    const dlpack::DataType want = dlpack_type(dtype);
    names += (names.empty() ? "" : " or ") + std::string(dtype_name(dtype));
    if (t.dtype.code == want.code && t.dtype.bits == want.bits && t.dtype.lanes == want.lanes) {
      accepted = true;
      dtype_ = dtype;
    }
  }
  if (!accepted) throw py::type_error(where + "expected dtype " + names + ", got " + describe(t.dtype));

  bool same_shape = static_cast<size_t>(t.rank) == shape.size();
  int64_t elements = 1;
  for (int32_t axis = 0; same_shape && axis < t.rank; ++axis) {
    const int64_t want = shape.begin()[axis];
    same_shape = want == kAny || want == t.shape[axis];
    shape_[axis] = t.shape[axis];
    elements *= t.shape[axis];
  }
  if (!same_shape)
    throw py::value_error(where + "expected shape " + describe(shape.begin(), shape.size()) + ", got " +
                          describe(t.shape, static_cast<size_t>(t.rank)));
  int64_t dense = 1;
  for (int32_t axis = t.rank - 1; axis >= 0; --axis) {
    strides_[axis] = t.strides ? t.strides[axis] : dense;
    dense *= t.shape[axis];
  }
  if (layout == Layout::strided && t.rank > 0 && t.shape[t.rank - 1] > 1 && strides_[t.rank - 1] != 1)
    throw py::value_error(where + "expected unit stride along the last axis, got strides " +
                          describe(t.strides, static_cast<size_t>(t.rank)));
  if (layout == Layout::contiguous && !is_contiguous(t))
    throw py::value_error(where + "expected a contiguous tensor, got strides " +
                          describe(t.strides, static_cast<size_t>(t.rank)));
  if (t.data == nullptr && elements > 0)
    throw py::type_error(where + "expected a tensor with memory, got one without (a fake tensor)");
  data_ = static_cast<char*>(t.data) + t.byte_offset;
}

void check_range(const TensorView& values, const char* name, int64_t limit) {
  for (int64_t i = 0; i < values.size(0); ++i) {
    const int64_t value = values.as<const int64_t>()[i];
    if (value < 0 || value >= limit)
      throw py::value_error(std::string(name) + ": expected values in 0.." + std::to_string(limit - 1) +
                            ", got " + std::to_string(value) + " at index " + std::to_string(i));
  }
}

void check_num_threads(int num_threads) {
  if (num_threads < 1)
    throw py::value_error("num_threads: expected at least 1, got " + std::to_string(num_threads));
}

}  // namespace loopmdm
