"""What `make_sparse` and a sparse model refuse, and how the error reads."""

import subprocess
import sys
import types

import pytest
import torch
from inputs import normal
from tiny_models import FAMILIES, T, assert_same, tiny, tokens
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import dsa_ref
from dsa_ref.integrations.transformers import make_sparse, undo_sparse

families = pytest.mark.parametrize("family", FAMILIES)


def test_models_and_arguments():
    model = tiny("deepseek_v32")
    llama = LlamaForCausalLM(
        LlamaConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=1, intermediate_size=8, vocab_size=9)
    )
    for wrong, got in ((llama, "a LlamaForCausalLM without"), (dsa_ref, "transformers model, got module")):
        with pytest.raises(TypeError, match=f"model must be .*{got}"):
            make_sparse(wrong)
    with pytest.raises(TypeError, match="must have been through make_sparse, got a DeepseekV32ForCausalLM"):
        undo_sparse(model)
    for index_fp8 in (1, None, "yes"):
        with pytest.raises(TypeError, match=f"index_fp8 must be a bool, got {index_fp8!r}"):
            make_sparse(model, index_fp8=index_fp8)
    with pytest.raises(TypeError, match="ops must be dsa_ref or dsa_kernels, got .*without hadamard, quantize"):
        make_sparse(model, ops=torch)
    namespace = types.SimpleNamespace(**vars(dsa_ref))
    with pytest.raises(ValueError, match="ops must be a package that can be imported by its name"):
        make_sparse(model, ops=namespace)
    with pytest.raises(ValueError, match="index_fp8 needs an index_head_dim that is a power of two, got 24"):
        make_sparse(tiny("deepseek_v32", index_head_dim=24), index_fp8=True)
    assert model.config._attn_implementation == "eager"  # nothing was begun


def test_a_replaced_forward():
    model, x = tiny("deepseek_v32"), tokens()
    wanted, layer = model(x).logits, model.model.layers[1].self_attn
    own = layer.forward
    layer.forward = lambda *args, **kwargs: own(*args, **kwargs)
    with pytest.raises(ValueError, match="got a layer 1 whose forward was replaced by <function"):
        make_sparse(model)
    layer._old_forward = own  # accelerate's way: what it wraps can be told
    layer.forward = types.MethodType(lambda self, *args, **kwargs: self._old_forward(*args, **kwargs), layer)
    assert_same(make_sparse(model)(x).logits, wanted)
    assert layer._old_forward.__func__ is not own.__func__
    undo_sparse(model)
    assert layer._old_forward.__func__ is own.__func__
    assert_same(model(x).logits, wanted)


@families
def test_calls(family):
    model, x = make_sparse(tiny(family)), tokens()
    with pytest.raises(ValueError, match="output_attentions must be False"):
        model(x, output_attentions=True)
    dropping = make_sparse(tiny(family, attention_dropout=0.1))
    dropping(x)
    with pytest.raises(ValueError, match="attention_dropout must be 0 in training, got 0.1"):
        dropping.train()(x)
    with pytest.raises(ValueError, match="one run of the keys"):
        model(x, attention_mask=torch.rand(2, 1, T, T) > 0.5)


@families
def test_a_model_that_is_not_sparse(family):
    """The name of the implementation alone does nothing: a config that was copied from a sparse model has it."""
    other = type(make_sparse(tiny(family)))(tiny(family).config)
    other.set_attn_implementation("dsa")
    with pytest.raises(ValueError, match=r'attn_implementation "dsa" needs make_sparse\(model\)'):
        other(tokens())


@families
def test_a_cache_of_the_other_kind(family):
    """FP8's keys are rotated, and plain ones are not."""
    model, x = make_sparse(tiny(family), index_fp8=True), tokens()
    rotated, plain = (DynamicCache(config=model.config) for _ in range(2))
    model(x[:, :20], past_key_values=rotated)
    make_sparse(model)(x[:, :20], past_key_values=plain)
    with pytest.raises(ValueError, match="continued with index_fp8=True as they began, got index_fp8=False and 'dsa'"):
        model(x[:, 20:], past_key_values=rotated)
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="continued with index_fp8=True as they began, got .* and 'eager'"):
        model(x[:, 20:], past_key_values=rotated)
    wanted = model(x).logits[:, 20:]
    assert_same(model(x[:, 20:], past_key_values=plain).logits, wanted)  # transformers' own goes on with ours
    make_sparse(model, index_fp8=True)
    with pytest.raises(ValueError, match="continued with index_fp8=False as they began, got index_fp8=True"):
        model(x[:, :1], past_key_values=plain)


@families
def test_a_refused_call_leaves_the_cache(family):
    model, x = make_sparse(tiny(family)), tokens()
    wanted = model(x).logits[:, 20:]
    cache = DynamicCache(config=model.config)
    model(x[:, :20], past_key_values=cache)
    with pytest.raises(ValueError):
        model(x[:, 20:], past_key_values=cache, output_attentions=True)
    with pytest.raises(ValueError):
        model(x[:, 20:], past_key_values=cache, attention_mask=torch.rand(2, 1, 20, T) > 0.5)
    assert cache.get_seq_length() == 20
    assert_same(model(x[:, 20:], past_key_values=cache).logits, wanted)


def test_a_nonlinear_kv_b_proj():
    model = tiny("deepseek_v32")
    attention = model.model.layers[0].self_attn
    attention.kv_b_proj = torch.nn.Sequential(attention.kv_b_proj, torch.nn.Tanh())
    with pytest.raises(ValueError, match="kv_b_proj must be linear"):
        make_sparse(model)(tokens())


@pytest.mark.parametrize("version", ("5.22.2", "4.57.6", "none"))
def test_other_versions(version):
    """The installed version is only read: a process in which it reads otherwise."""
    code = f"""
import importlib.metadata as metadata
own = metadata.version
def version(name):
    if name == "transformers" and {version!r} == "none":
        raise metadata.PackageNotFoundError(name)
    return {version!r} if name == "transformers" else own(name)
metadata.version = version
import dsa_ref.integrations.transformers
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    said = f"dsa_ref.integrations.transformers needs transformers 5.23 or newer, got {version}: pip install"
    assert said in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("module", ("transformers", "transformers.report", "transformers.attention"))
def test_no_transformers(module):
    """Installed, as metadata has it, but an import hook keeps it out: the same error as where it is missing."""
    code = f"""
import sys
class Hook:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "transformers":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hook())
import dsa_ref.integrations.{module}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    said = "dsa_ref.integrations.transformers needs transformers 5.23 or newer, got none: pip install"
    assert said in done.stderr.splitlines()[-1]


def test_nan_is_refused_as_everywhere():
    """An indexer that meets NaN has no best keys."""
    model = tiny("deepseek_v32")
    model.model.embed_tokens.weight[5] = normal(64, seed=0) * torch.nan
    x = tokens()
    x[0, 20] = 5
    with pytest.raises(ValueError, match="NaN"):
        make_sparse(model)(x)
