// The functions of loopmdm_kernels._C without a Python: calls come from standard input and answers go to
// standard output, as plugin.py writes and reads them. Tensors travel whole, and come back after the call.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <vector>

#include "bindings/ops.h"
#include "bindings/tensor_view.h"
#include "cpu/machine/isa.h"

namespace py = pybind11;

namespace loopmdm {
namespace {

constexpr int kItem[] = {4, 8, 2, 4, 8, 1, 1};  // bytes, of each DType

}  // namespace

TensorView::TensorView(py::handle object, const char* name, std::initializer_list<DType> dtypes,
                       std::initializer_list<int64_t> shape, Layout)
    : data_(object.value().data), dtype_(static_cast<DType>(object.value().dtype)) {
  const py::Value& value = object.value();
  if (value.kind != 'T') throw py::type_error(std::string(name) + ": expected a tensor");
  bool accepted = false;
  for (const DType dtype : dtypes) accepted = accepted || dtype == dtype_;
  if (!accepted) throw py::type_error(std::string(name) + ": wrong dtype");
  bool fits = value.shape.size() == shape.size();
  for (size_t i = 0; fits && i < shape.size(); ++i)
    fits = shape.begin()[i] == kAny || shape.begin()[i] == value.shape[i];
  if (!fits || value.shape.size() > kMaxRank) throw py::value_error(std::string(name) + ": wrong shape");
  int64_t stride = 1;
  for (size_t i = value.shape.size(); i-- > 0; stride *= value.shape[i]) {
    shape_[i] = value.shape[i];
    strides_[i] = stride;
  }
}

void check_range(const TensorView& values, const char* name, int64_t limit) {
  for (int64_t i = 0; i < values.size(0); ++i)
    if (values.as<int64_t>()[i] < 0 || values.as<int64_t>()[i] >= limit)
      throw py::value_error(std::string(name) + ": out of range");
}

void check_num_threads(int num_threads) {
  if (num_threads < 1) throw py::value_error("num_threads: expected at least 1");
}

namespace {

void read(void* to, size_t bytes) {
  if (bytes > 0 && std::fread(to, bytes, 1, stdin) != 1) std::exit(0);  // nobody asks any more
}

template <class T>
T read_one() {
  T value;
  read(&value, sizeof value);
  return value;
}

std::string read_text() {
  std::string text(read_one<uint32_t>(), ' ');
  read(text.data(), text.size());
  return text;
}

py::Value read_value() {
  py::Value value;
  value.kind = read_one<char>();
  switch (value.kind) {
    case 'I':
    case 'B':
      value.integer = read_one<int64_t>();
      break;
    case 'F':
      value.real = read_one<double>();
      break;
    case 'S':
      value.text = read_text();
      break;
    case 'L':
      for (uint32_t left = read_one<uint32_t>(); left > 0; --left) value.list.push_back(read_value());
      break;
    case 'T': {
      value.dtype = read_one<char>();
      int64_t bytes = kItem[value.dtype];
      for (char left = read_one<char>(); left > 0; --left) {
        value.shape.push_back(read_one<int64_t>());
        bytes *= value.shape.back();
      }
      value.integer = bytes;
      value.data =
          static_cast<char*>(std::aligned_alloc(64, static_cast<size_t>(bytes + 64) / 64 * 64));
      read(value.data, static_cast<size_t>(bytes));
      break;
    }
  }
  return value;
}

void write(const void* from, size_t bytes) { std::fwrite(from, 1, bytes, stdout); }

void write_text(const std::string& text) {
  const uint32_t size = static_cast<uint32_t>(text.size());
  write(&size, sizeof size);
  write(text.data(), text.size());
}

void write_value(const py::Value& value) {
  write(&value.kind, 1);
  if (value.kind == 'I') write(&value.integer, sizeof value.integer);
  if (value.kind == 'S') write_text(value.text);
}

void give_back(const py::Value& value) {
  for (const py::Value& item : value.list) give_back(item);
  if (value.kind != 'T') return;
  write(value.data, static_cast<size_t>(value.integer));
  std::free(value.data);
}

std::string cpu_isa() { return cpu::isa_name(cpu::current_isa()); }

// The signature of each function, "name argument ... argument=" with = where there is a default.
std::string signatures(const py::module_& m) {
  std::string text;
  for (const auto& [name, function] : m.functions) {
    text += name;
    for (const py::arg& argument : function.arguments)
      text += " " + argument.name + (argument.given ? "=" : "");
    text += "\n";
  }
  return text;
}

int serve() {
  py::module_ m;
  bind_attention(m);
  bind_head_logits(m);
  bind_linear(m);
  bind_looped_blocks(m);
  bind_masked_cross_entropy(m);
  bind_sample_rows(m);
  m.def("cpu_isa", &cpu_isa);
  m.def("usable_cpu_isas", &cpu::usable_isa_names);
  write_text(signatures(m));
  for (;;) {
    std::fflush(stdout);
    setenv("LOOPMDM_CPU_ISA", read_text().c_str(), 1);
    const auto& function = m.functions.at(read_text());
    std::vector<py::Value> given = read_value().list;
    const size_t count = given.size();
    for (size_t i = count; i < function.arguments.size(); ++i) given.push_back(function.arguments[i].instead);
    std::string error;
    py::Value result;
    try {
      result = function.call(given);
    } catch (const py::type_error& e) {
      error = std::string("TypeError ") + e.what();
    } catch (const py::value_error& e) {
      error = std::string("ValueError ") + e.what();
    } catch (const std::exception& e) {
      error = std::string("RuntimeError ") + e.what();
    }
    write_text(error);
    write_value(result);
    for (size_t i = 0; i < count; ++i) give_back(given[i]);
  }
}

}  // namespace
}  // namespace loopmdm

int main() { return loopmdm::serve(); }
