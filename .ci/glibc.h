/* For `gcc -include`: the oldest versions of these functions, so that a wheel runs with an older glibc than that of the
   machine that builds it. glibc 2.34 only moved them from libpthread and libdl to libc, and gave them a new version. */
#if defined(__x86_64__)
__asm__(".symver dladdr, dladdr@GLIBC_2.2.5");
__asm__(".symver pthread_attr_setstacksize, pthread_attr_setstacksize@GLIBC_2.2.5");
__asm__(".symver pthread_create, pthread_create@GLIBC_2.2.5");
__asm__(".symver pthread_join, pthread_join@GLIBC_2.2.5");
#endif
