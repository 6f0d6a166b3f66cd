// LD_PRELOAD: each TCP connection sends at most PACED_BYTES a second, which the kernel sees to (SO_MAX_PACING_RATE).
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/socket.h>

static int paced(int fd) {
  unsigned long rate = strtoul(getenv("PACED_BYTES"), NULL, 10);
  if (fd >= 0) setsockopt(fd, SOL_SOCKET, SO_MAX_PACING_RATE, &rate, sizeof rate);
  return fd;
}

int connect(int fd, const struct sockaddr *address, socklen_t length) {
  int (*next)(int, const struct sockaddr *, socklen_t) = dlsym(RTLD_NEXT, "connect");
  return next(paced(fd), address, length);
}

int accept(int fd, struct sockaddr *address, socklen_t *length) {
  int (*next)(int, struct sockaddr *, socklen_t *) = dlsym(RTLD_NEXT, "accept");
  return paced(next(fd, address, length));
}

int accept4(int fd, struct sockaddr *address, socklen_t *length, int flags) {
  int (*next)(int, struct sockaddr *, socklen_t *, int) = dlsym(RTLD_NEXT, "accept4");
  return paced(next(fd, address, length, flags));
}
