"""An adapter of ours written out under the authors' keys."""

MLP = {"weight_in": "0.weight", "bias_in": "0.bias", "weight_out": "2.weight", "bias_out": "2.bias"}


def authors_state(model):
    """One tensor per expert; under every layer its router, and a copy of the lambda MLPs of *every* width."""
    state = {}
    for group in model.input_groups:
        for g, path in enumerate(group.members):
            prefix = f"base_model.model.{path}."
            for i in range(group.num_experts):
                state[f"{prefix}lora_A{i}.weight"] = group.lora_A[g, i]
                state[f"{prefix}lora_B{i}.weight"] = group.lora_B[g][i].t()
            state[f"{prefix}lora_route.weight"] = group.gate[g]
            mlps = dict(model.lambda_mlps.items()) or {str(group.in_features): group.lambda_mlp}
            for width, mlp in mlps.items():
                for ours, theirs in MLP.items():
                    state[f"{prefix}sparsegen.mlp.proj_layers.{width}.{theirs}"] = getattr(mlp, ours)
    return {key: value.detach().clone().contiguous() for key, value in state.items()}
