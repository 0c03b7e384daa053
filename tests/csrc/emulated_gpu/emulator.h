// Runs a kernel on the CPU: every thread of every block is a fiber, and the instructions of
// csrc/cuda/ptx are emulated by what the PTX manual says of them. Loads arrive late and in random order,
// products are done late, fibers take turns at random. What the manual forbids ends the run, as a kernel does
// in which every thread waits: `fault` says what it was.
//
// fibers.h has the threads, order.h what must be ordered before what, builtins.h the language.
#pragma once

#include "builtins.h"
#include "fibers.h"
#include "order.h"
