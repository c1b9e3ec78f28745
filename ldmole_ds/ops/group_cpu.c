/* What an input group computes between its products on a CPU (ldmole_ds/ops/group_product.py), in one call each way:
 * the lambda MLP after its first product, routing (routing_cpu.c), and the experts' rows times their routing weights.
 *
 * `rows` is the product of all that the group multiplies its input with, tokens innermost:
 *
 *     G * E * r rows h = A x      then G * E rows of router logits      then H rows of the lambda MLP's hidden units
 *
 * Called after a large product, code and data come from far away: what counts is how many small steps there are.
 */

#include <stdint.h>
#include <stdlib.h>

#include "routing_cpu.h"

#define LANES 16

/* Sum of products, in lanes that the compiler keeps in a vector. b may be NULL, for a sum. */
static float dot(const float *a, const float *b, int64_t n) {
    float lanes[LANES] = {0};
    int64_t t = 0;
    for (; t + LANES <= n; t += LANES)
        for (int i = 0; i < LANES; i++) lanes[i] += b ? a[t + i] * b[t + i] : a[t + i];
    float total = 0.0f;
    for (; t < n; t++) total += b ? a[t] * b[t] : a[t];
    for (int i = 0; i < LANES; i++) total += lanes[i];
    return total;
}

/* In place: the hidden units' rows get bias and ReLU. Comparisons are such that NaN stays NaN. */
static void lambda_forward(float *hidden, const float *bias_in, const float *weight_out, float bias_out, float *logit,
                           uint8_t *live, int64_t tokens, int64_t units) {
    for (int64_t t = 0; t < tokens; t++) logit[t] = bias_out;
    for (int64_t j = 0; j < units; j++) {
        float *row = hidden + j * tokens;
        const float bias = bias_in[j], weight = weight_out[j];
        for (int64_t t = 0; t < tokens; t++) {
            const float value = row[t] + bias;
            row[t] = value < 0 ? 0.0f : value;
            logit[t] += weight * row[t];
        }
        live[j] = dot(row, NULL, tokens) > 0;
    }
}

int group_forward(float *rows, const float *bias_in, const float *weight_out, const float *bias_out,
                  const uint8_t *mask /* or NULL */, float *lambda_logit, uint8_t *live, float *probs, float *lambdas,
                  float *sums, float *weighted, int64_t tokens, int64_t experts, int64_t members, int64_t r, int64_t units,
                  int64_t target, int mask_padding, float scaling) {
    const int64_t pairs = members * experts;
    float *logits = rows + pairs * r * tokens, *hidden = logits + pairs * tokens;
    lambda_forward(hidden, bias_in, weight_out, *bias_out, lambda_logit, live, tokens, units);
    if (routing_forward(logits, lambda_logit, mask, probs, lambdas, sums, NULL, tokens, experts, members, target, 0, 0,
                        mask_padding))
        return 1;
    for (int64_t i = 0; i < pairs; i++)
        for (int64_t k = i * r; k < (i + 1) * r; k++) {
            const float *h = rows + k * tokens, *p = probs + i * tokens;
            float *out = weighted + k * tokens;
            for (int64_t t = 0; t < tokens; t++) out[t] = h[t] * (p[t] * scaling);
        }
    return 0;
}

/* `grad_rows` comes with the gradients of the weighted rows where h was, and leaves with those of all rows. */
int group_backward(const float *rows, const float *weight_out, const uint8_t *mask /* or NULL */, const float *lambda_logit,
                   const float *probs, const float *grad_sums /* or NULL */, float *grad_rows, float *grad_weight_out,
                   float *grad_bias_in, float *grad_bias_out, int64_t tokens, int64_t experts, int64_t members, int64_t r,
                   int64_t units, int64_t target, int mask_padding, float scaling) {
    const int64_t pairs = members * experts;
    const float *logits = rows + pairs * r * tokens, *hidden = logits + pairs * tokens;
    float *grad_logits = grad_rows + pairs * r * tokens, *grad_hidden = grad_logits + pairs * tokens;
    float *grad_probs = calloc((pairs + 1) * tokens + 1, sizeof(float));
    if (!grad_probs) return 1;
    float *grad_lambda = grad_probs + pairs * tokens;
    for (int64_t i = 0; i < pairs; i++) {
        const float *p = probs + i * tokens;
        float *grad_p = grad_probs + i * tokens;
        for (int64_t k = i * r; k < (i + 1) * r; k++) {
            const float *h = rows + k * tokens;
            float *grad = grad_rows + k * tokens;
            for (int64_t t = 0; t < tokens; t++) {
                grad_p[t] += scaling * grad[t] * h[t];
                grad[t] *= p[t] * scaling;
            }
        }
    }
    if (routing_backward(logits, lambda_logit, mask, grad_probs, grad_sums, grad_logits, grad_lambda, tokens, experts,
                         members, target, mask_padding)) {
        free(grad_probs);
        return 1;
    }
    *grad_bias_out = dot(grad_lambda, NULL, tokens);
    for (int64_t j = 0; j < units; j++) {
        const float *row = hidden + j * tokens, weight = weight_out[j];
        float *grad = grad_hidden + j * tokens;
        grad_weight_out[j] = dot(grad_lambda, row, tokens);
        for (int64_t t = 0; t < tokens; t++) grad[t] = row[t] > 0 ? weight * grad_lambda[t] : 0.0f;
        grad_bias_in[j] = dot(grad, NULL, tokens);
    }
    free(grad_probs);
    return 0;
}
