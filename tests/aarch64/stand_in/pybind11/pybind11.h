// What csrc/bindings uses of pybind11, without a Python: values come from a stream, see ../../server.cpp.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace pybind11 {

// N none, I integer, F float, B bool, S text, L list, T tensor.
struct Value {
  char kind = 'N';
  int64_t integer = 0;
  double real = 0;
  std::string text = {};
  std::vector<Value> list = {};
  int dtype = 0;
  std::vector<int64_t> shape = {};
  char* data = nullptr;
};

struct value_error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct type_error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class handle {
 public:
  handle(const Value& value) : value_(&value) {}
  const Value& value() const { return *value_; }
  bool is_none() const { return value_->kind == 'N'; }

 private:
  const Value* value_;
};

class sequence : public handle {
 public:
  using handle::handle;
  handle operator[](size_t index) const { return value().list.at(index); }
};

inline size_t len(const handle& value) { return value.value().list.size(); }

inline handle none() {
  static const Value nothing;
  return nothing;
}

struct gil_scoped_release {
  gil_scoped_release() {}
};

struct arg {
  explicit arg(const char* name) : name(name) {}
  arg& none(bool) { return *this; }
  arg& operator=(int64_t value) {
    given = true;
    instead = Value{.kind = 'I', .integer = value};
    return *this;
  }
  arg& operator=(const handle& value) {
    given = true;
    instead = value.value();
    return *this;
  }

  std::string name;
  bool given = false;
  Value instead;
};

template <class T>
T converted(const Value& value) {
  if constexpr (std::is_same_v<T, handle> || std::is_same_v<T, sequence>) {
    return T(value);
  } else if constexpr (std::is_same_v<T, std::string>) {
    return value.text;
  } else if constexpr (std::is_floating_point_v<T>) {
    return static_cast<T>(value.kind == 'F' ? value.real : static_cast<double>(value.integer));
  } else {
    if (value.kind == 'F' || value.kind == 'T' || value.kind == 'N') throw type_error("expected an integer");
    return static_cast<T>(value.integer);
  }
}

inline Value value_of(const std::string& text) { return {.kind = 'S', .text = text}; }
inline Value value_of(int64_t number) { return {.kind = 'I', .integer = number}; }
inline Value value_of(uint64_t number) { return value_of(static_cast<int64_t>(number)); }

class module_ {
 public:
  struct Function {
    std::vector<arg> arguments;
    std::function<Value(const std::vector<Value>&)> call;
  };

  template <class Result, class... Arguments, class... Names>
  module_& def(const char* name, Result (*function)(Arguments...), Names... names) {
    Function& made = functions[name];
    (made.arguments.push_back(names), ...);
    made.call = [function](const std::vector<Value>& given) {
      return called(function, given, std::index_sequence_for<Arguments...>());
    };
    return *this;
  }

  int64_t& attr(const char* name) { return constants[name]; }

  std::map<std::string, Function> functions;
  std::map<std::string, int64_t> constants;

 private:
  template <class Result, class... Arguments, size_t... Index>
  static Value called(Result (*function)(Arguments...), const std::vector<Value>& given,
                      std::index_sequence<Index...>) {
    if constexpr (std::is_void_v<Result>) {
      function(converted<std::decay_t<Arguments>>(given[Index])...);
      return {};
    } else {
      return value_of(function(converted<std::decay_t<Arguments>>(given[Index])...));
    }
  }
};

}  // namespace pybind11
