// Methods of a class that Python calls with all arguments in order, past pybind11's dispatcher: for 13 arguments that takes 3,000
// instructions, a fifth of what a pass of a layer takes the host.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <type_traits>
#include <utility>

namespace fedms::python {

namespace py = pybind11;

// The items of a list or a tuple, which is not to change meanwhile.
class Items {
 public:
  explicit Items(py::handle of) {
    if (!PyList_Check(of.ptr()) && !PyTuple_Check(of.ptr())) {
      throw py::type_error(std::string("expected a list or a tuple, got a ") + Py_TYPE(of.ptr())->tp_name);
    }
    items_ = PySequence_Fast_ITEMS(of.ptr());
    size_ = static_cast<size_t>(PySequence_Fast_GET_SIZE(of.ptr()));
  }

  size_t size() const { return size_; }
  py::handle operator[](size_t i) const { return items_[i]; }

 private:
  PyObject** items_;
  size_t size_;
};

template <class T>
T argument(PyObject* object) {
  if constexpr (std::is_same_v<T, double>) {
    const double number = PyFloat_AsDouble(object);
    if (number == -1.0 && PyErr_Occurred()) throw py::error_already_set();
    return number;
  } else {
    return T(py::handle(object));
  }
}

// What `FastMethod` calls a method that returns nothing and takes handles, numbers and Items with.
template <class Owner, class... Args, size_t... I>
void call_method(void (Owner::*method)(Args...) const, const Owner& owner, PyObject* const* args, std::index_sequence<I...>) {
  (owner.*method)(argument<std::decay_t<Args>>(args[I])...);
}

template <class Owner, class... Args>
void call_method(void (Owner::*method)(Args...) const, PyObject* self, PyObject* const* args, Py_ssize_t count) {
  if (count != static_cast<Py_ssize_t>(sizeof...(Args))) {
    throw py::type_error("expected " + std::to_string(sizeof...(Args)) + " arguments, got " + std::to_string(count));
  }
  call_method(method, py::handle(self).cast<const Owner&>(), args, std::index_sequence_for<Args...>());
}

// A method of a class of pybind11's. Its exceptions become those that pybind11 would make of them.
template <auto method>
PyObject* fast_method(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  try {
    call_method(method, self, args, count);
  } catch (...) {
    py::detail::try_translate_exceptions();
    return nullptr;
  }
  Py_RETURN_NONE;
}

// Adds it to its class. `doc` has to last as long as the class.
template <auto method>
void define_fast_method(py::handle owner, const char* name, const char* doc) {
  static PyMethodDef definition{};
  definition = {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&fast_method<method>)), METH_FASTCALL, doc};
  PyObject* const descriptor = PyDescr_NewMethod(reinterpret_cast<PyTypeObject*>(owner.ptr()), &definition);
  if (!descriptor) throw py::error_already_set();
  owner.attr(name) = py::reinterpret_steal<py::object>(descriptor);
}

}  // namespace fedms::python
