// For host_cost.py: counts instructions between start and stop, which writes a profile.
#include <valgrind/callgrind.h>

extern "C" void start() {
  CALLGRIND_START_INSTRUMENTATION;
  CALLGRIND_ZERO_STATS;
}
extern "C" void stop(const char* name) {
  CALLGRIND_DUMP_STATS_AT(name);
  CALLGRIND_STOP_INSTRUMENTATION;
}
