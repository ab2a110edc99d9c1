/* Shifts the wall clock of the program it is preloaded into, and no other clock, by the seconds in a file.
   CLOCK_SHIFT names a file of one double; gcc -shared -fPIC clock_shift.c -o clock_shift.so -ldl */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>

int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    static const volatile double *shift;
    if (!real) {
        const char *path = getenv("CLOCK_SHIFT");
        int file = path ? open(path, O_RDONLY) : -1;
        void *mapped = file < 0 ? MAP_FAILED : mmap(NULL, sizeof(double), PROT_READ, MAP_SHARED, file, 0);
        shift = mapped == MAP_FAILED ? NULL : mapped;
        real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    }
    int code = real(clock, now);
    if (code == 0 && clock == CLOCK_REALTIME && shift) now->tv_sec += (time_t)*shift;
    return code;
}
