/* What routing_cpu.c gives: see there. */

#ifndef LDMOLE_ROUTING_CPU_H
#define LDMOLE_ROUTING_CPU_H

#include <stdint.h>

int routing_forward(
    const float *logits, const float *lambda_logits, const uint8_t *mask /* or NULL */, float *probs, float *lambdas,
    float *sums, uint8_t *destinations /* or NULL */, int64_t t_all, int64_t experts, int64_t members, int64_t target,
    int64_t ep_size, int64_t own_rank, int mask_padding);

int routing_backward(
    const float *logits, const float *lambda_logits, const uint8_t *mask /* or NULL */, const float *grad_probs /* or NULL */,
    const float *grad_sums /* or NULL */, float *grad_logits, float *grad_lambda_logits, int64_t t_all, int64_t experts,
    int64_t members, int64_t target, int mask_padding);

#endif
