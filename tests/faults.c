/* Preloaded into a process: the n-th system call that changes the filesystem fails, stops half way,
 * or is the process's last. fault_arm() begins to count; fault_count() says how many there were. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

enum { NONE = 0, KILL = -1, SHORT = -2 }; /* else an errno */

static int armed, at, kind, lasting, count;

void fault_arm(int which, int what, int stays) {
    armed = 1, at = which, kind = what, lasting = stays, count = 0;
}

int fault_count(void) { return count; }

/* Whether this call is to fail (errno is set); a kill does not return. */
static int hit(void) {
    if (!armed) return NONE;
    count++;
    if (count != at && !(lasting && at && count > at)) return NONE;
    if (kind == KILL) raise(SIGKILL);
    if (kind > 0) errno = kind;
    return kind;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define CALL(name, args, ...)                     \
    int name args {                               \
        if (hit() > 0) return -1;                 \
        return REAL(name)(__VA_ARGS__);           \
    }

CALL(fsync, (int fd), fd)
CALL(fdatasync, (int fd), fd)
CALL(rename, (const char *a, const char *b), a, b)
CALL(mkdir, (const char *path, mode_t mode), path, mode)
CALL(chmod, (const char *path, mode_t mode), path, mode)
CALL(unlink, (const char *path), path)
CALL(rmdir, (const char *path), path)
CALL(unlinkat, (int dir, const char *path, int flags), dir, path, flags)
CALL(ftruncate64, (int fd, off64_t length), fd, length)

ssize_t write(int fd, const void *buffer, size_t size) {
    int what = hit();
    if (what > 0) return -1;
    if (what == SHORT && size > 1) size /= 2;
    return REAL(write)(fd, buffer, size);
}

#define OPEN(name)                                                        \
    int name(const char *path, int flags, ...) {                          \
        va_list rest;                                                     \
        va_start(rest, flags);                                            \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest);                                                     \
        if ((flags & O_ACCMODE) != O_RDONLY && hit() > 0) return -1;      \
        return REAL(name)(path, flags, mode);                             \
    }

OPEN(open)
OPEN(open64)
