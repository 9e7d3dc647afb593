/* An empty Python module, so that every platform can build, find and load the library; its functions are called
   through ctypes, which lets go of the interpreter's lock while they run. */
#include <Python.h>

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_smelt", NULL, -1, NULL, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__smelt(void) { return PyModule_Create(&module); }
