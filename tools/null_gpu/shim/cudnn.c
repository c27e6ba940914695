// cuDNN's graphs on the null GPU, preloaded: the installed cuDNN says by its own heuristics what it supports, for the device of the JSON
// file NULL_GPU_PROPERTIES. That is cuDNN's documented way of asking without a device; here it takes the place of the handle of
// callers that have one. A plan cannot be made, because its kernels would be compiled by a driver.
#include <cudnn.h>
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>

// Calls the installed function, which has the name of the one below.
#define INSTALLED(name) ((__typeof__(&name))installed(#name))

static void *installed(const char *name) {
    static void *library;
    if (!library) library = dlopen("libcudnn.so.9", RTLD_NOW);
    void *function = library ? dlsym(library, name) : 0;
    if (!function) {
        fprintf(stderr, "null GPU: no %s: %s\n", name, dlerror());
        abort();
    }
    return function;
}

static cudnnStatus_t set_properties(cudnnBackendDescriptor_t descriptor, cudnnBackendAttributeName_t attribute) {
    static cudnnBackendDescriptor_t properties;
    if (!properties) {
        char text[4096];
        const char *path = getenv("NULL_GPU_PROPERTIES");
        FILE *file = path ? fopen(path, "r") : 0;
        if (!file) return CUDNN_STATUS_NOT_INITIALIZED;
        size_t size = fread(text, 1, sizeof text - 1, file);
        text[size] = 0;
        fclose(file);
        cudnnStatus_t status = INSTALLED(cudnnBackendCreateDescriptor)(CUDNN_BACKEND_DEVICEPROP_DESCRIPTOR, &properties);
        if (!status)
            status = INSTALLED(cudnnBackendSetAttribute)(properties, CUDNN_ATTR_DEVICEPROP_JSON_REPRESENTATION,
                                                         CUDNN_TYPE_CHAR, size + 1, text);
        if (!status) status = INSTALLED(cudnnBackendFinalize)(properties);
        if (status) return status;
    }
    return INSTALLED(cudnnBackendSetAttribute)(descriptor, attribute, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &properties);
}

cudnnStatus_t cudnnCreate(cudnnHandle_t *handle) { *handle = calloc(1, 64); return 0; }
cudnnStatus_t cudnnDestroy(cudnnHandle_t handle) { free(handle); return 0; }
cudnnStatus_t cudnnSetStream(cudnnHandle_t handle, cudaStream_t stream) { return 0; }
cudnnStatus_t cudnnGetStream(cudnnHandle_t handle, cudaStream_t *stream) { *stream = 0; return 0; }
cudnnStatus_t cudnnBackendCreateDescriptor(cudnnBackendDescriptorType_t type, cudnnBackendDescriptor_t *made) {
    cudnnStatus_t status = INSTALLED(cudnnBackendCreateDescriptor)(type, made);
    if (status) return status;
    if (type == CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR) return set_properties(*made, CUDNN_ATTR_ENGINEHEUR_DEVICEPROP);
    if (type == CUDNN_BACKEND_ENGINE_DESCRIPTOR) return set_properties(*made, CUDNN_ATTR_ENGINE_DEVICEPROP);
    return 0;
}
cudnnStatus_t cudnnBackendSetAttribute(cudnnBackendDescriptor_t descriptor, cudnnBackendAttributeName_t attribute,
                                       cudnnBackendAttributeType_t type, int64_t count, const void *values) {
    if (attribute == CUDNN_ATTR_OPERATIONGRAPH_HANDLE) return 0;
    if (attribute == CUDNN_ATTR_EXECUTION_PLAN_HANDLE)
        return set_properties(descriptor, CUDNN_ATTR_EXECUTION_PLAN_DEVICEPROP);
    return INSTALLED(cudnnBackendSetAttribute)(descriptor, attribute, type, count, values);
}
