"""Every spelling of a module's name that adapter files use, and the module of ours that it means."""

from __future__ import annotations

import pytest

from sfumato.families import FAMILIES
from sfumato.weights.adapters.names import diffusers_modules, find, kohya_modules, module_tables
from sfumato.weights.parts import shapes_of
from tests.tiny import TINIES

Q = "transformer_blocks.0.attn1.to_q"
OUT = "transformer_blocks.0.attn2.to_out.0"
LAYER = "text_model.encoder.layers"
SPELLINGS = [
    # kohya, diffusers' blocks
    ("sd1", f"lora_unet_down_blocks_0_attentions_0_{Q.replace('.', '_')}", "unet", f"input_blocks.1.1.{Q}"),
    ("sd1", "lora_unet_down_blocks_0_attentions_0_proj_in", "unet", "input_blocks.1.1.proj_in"),
    ("sd1", f"lora_unet_mid_block_attentions_0_{OUT.replace('.', '_')}", "unet", f"middle_block.1.{OUT}"),
    ("sd1", "lora_unet_up_blocks_1_resnets_2_conv1", "unet", "output_blocks.5.0.in_layers.2"),
    ("sd1", "lora_unet_up_blocks_1_upsamplers_0_conv", "unet", "output_blocks.5.2.conv"),
    ("sd1", "lora_unet_down_blocks_0_downsamplers_0_conv", "unet", "input_blocks.3.0.op"),
    ("sd1", "lora_unet_down_blocks_1_resnets_0_conv_shortcut", "unet", "input_blocks.4.0.skip_connection"),
    ("sd1", "lora_unet_down_blocks_1_resnets_0_time_emb_proj", "unet", "input_blocks.4.0.emb_layers.1"),
    ("sd1", "lora_unet_conv_in", "unet", "input_blocks.0.0"),
    ("sd1", "lora_unet_conv_norm_out", "unet", "out.0"),
    ("sd1", "lora_unet_time_embedding_linear_1", "unet", "time_embed.0"),
    # kohya, the original's blocks
    ("sd1", f"lora_unet_input_blocks_1_1_{Q.replace('.', '_')}", "unet", f"input_blocks.1.1.{Q}"),
    ("sd1", "lora_unet_out_2", "unet", "out.2"),
    # text
    ("sd1", "lora_te_text_model_encoder_layers_3_self_attn_q_proj", "text", f"{LAYER}.3.self_attn.q_proj"),
    ("sd1", "lora_te1_text_model_encoder_layers_3_mlp_fc1", "text", f"{LAYER}.3.mlp.fc1"),
    ("sd1", f"text_encoder.{LAYER}.0.self_attn.out_proj", "text", f"{LAYER}.0.self_attn.out_proj"),
    ("sd1", f"cond_stage_model.transformer.{LAYER}.0.layer_norm1", "text", f"{LAYER}.0.layer_norm1"),
    ("sd1", f"base_model.model.{LAYER}.0.mlp.fc2", "text", f"{LAYER}.0.mlp.fc2"),
    ("sd1", "base_model.model.encoder.layers.0.mlp.fc2", "text", f"{LAYER}.0.mlp.fc2"),
    ("sd1", "lycoris_text_model_encoder_layers_1_mlp_fc1", "text", f"{LAYER}.1.mlp.fc1"),
    # diffusers and PEFT
    ("sd1", f"unet.down_blocks.0.attentions.0.{Q}", "unet", f"input_blocks.1.1.{Q}"),
    ("sd1", f"unet.mid_block.attentions.0.{OUT}", "unet", f"middle_block.1.{OUT}"),
    ("sd1", "unet.mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_out", "unet", f"middle_block.1.{OUT}"),
    ("sd1", "mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_out", "unet", f"middle_block.1.{OUT}"),
    ("sd1", f"base_model.model.down_blocks.0.attentions.0.{Q}", "unet", f"input_blocks.1.1.{Q}"),
    ("sd1", f"base_model.model.unet.down_blocks.0.attentions.0.{Q}", "unet", f"input_blocks.1.1.{Q}"),
    # LyCORIS, ComfyUI, plain paths
    ("sd1", "lycoris_down_blocks_0_attentions_0_proj_in", "unet", "input_blocks.1.1.proj_in"),
    ("sd1", f"diffusion_model.input_blocks.1.1.{Q}", "unet", f"input_blocks.1.1.{Q}"),
    ("sd1", f"model.diffusion_model.input_blocks.1.1.{Q}", "unet", f"input_blocks.1.1.{Q}"),
    ("sd1", f"input_blocks.1.1.{Q}", "unet", f"input_blocks.1.1.{Q}"),
    ("sd1", f"down_blocks.0.attentions.0.{Q}", "unet", f"input_blocks.1.1.{Q}"),
    # SD 2: HF's names of the text encoder, and OpenCLIP's
    ("sd2", "lora_te_text_model_encoder_layers_22_mlp_fc1", "text", f"{LAYER}.22.mlp.fc1"),
    ("sd2", "lora_te_model_transformer_resblocks_4_mlp_c_fc", "text", f"{LAYER}.4.mlp.fc1"),
    ("sd2", "lora_te_transformer_resblocks_4_attn_out_proj", "text", f"{LAYER}.4.self_attn.out_proj"),
    ("sd2", "cond_stage_model.model.transformer.resblocks.4.ln_2", "text", f"{LAYER}.4.layer_norm2"),
    ("sd2", "lora_unet_down_blocks_0_attentions_0_proj_in", "unet", "input_blocks.1.1.proj_in"),
    # XL
    (
        "xl",
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_k",
        "unet",
        "input_blocks.4.1.transformer_blocks.0.attn1.to_k",
    ),
    (
        "xl",
        "lora_unet_down_blocks_2_attentions_1_transformer_blocks_9_ff_net_0_proj",
        "unet",
        "input_blocks.8.1.transformer_blocks.9.ff.net.0.proj",
    ),
    ("xl", "lora_unet_label_emb_0_0", "unet", "label_emb.0.0"),
    ("xl", "lora_unet_add_embedding_linear_2", "unet", "label_emb.0.2"),
    ("xl", "lora_te1_text_model_encoder_layers_3_mlp_fc1", "text", f"{LAYER}.3.mlp.fc1"),
    ("xl", "lora_te2_text_model_encoder_layers_31_mlp_fc1", "text2", f"{LAYER}.31.mlp.fc1"),
    ("xl", f"text_encoder_2.{LAYER}.0.self_attn.v_proj", "text2", f"{LAYER}.0.self_attn.v_proj"),
    ("xl", f"text_encoder.{LAYER}.0.self_attn.v_proj", "text", f"{LAYER}.0.self_attn.v_proj"),
    ("xl", f"text_encoders.clip_g.transformer.{LAYER}.0.mlp.fc1", "text2", f"{LAYER}.0.mlp.fc1"),
    ("xl", "text_encoder_2.text_projection", "text2", "text_projection"),
    ("xl-refiner", "lora_te2_text_model_encoder_layers_31_mlp_fc1", "text", f"{LAYER}.31.mlp.fc1"),
]


@pytest.mark.parametrize(("family", "spelt", "part", "module"), SPELLINGS, ids=lambda value: str(value)[-50:])
def test_every_spelling_finds_its_module(family, spelt, part, module):
    (targets,) = find(spelt, FAMILIES[family])
    (target,) = targets
    assert (target.part, target.module, target.third) == (part, module, None)


def test_stacked_attention_of_openclip_is_three_modules():
    (targets,) = find("lora_te_model_transformer_resblocks_2_attn_in_proj", FAMILIES["sd2"])
    assert [(t.part, t.module, t.third) for t in targets] == [
        ("text", f"{LAYER}.2.self_attn.{name}_proj", third) for third, name in enumerate("qkv")
    ]


def test_a_bare_path_of_xls_text_encoders_may_mean_both():
    found = find(f"base_model.model.{LAYER}.0.mlp.fc1", FAMILIES["xl"])
    assert [targets[0].part for targets in found] == ["text", "text2"]


@pytest.mark.parametrize("spelt", ["", "lora_unet_", "lora_unet_double_blocks_0_img_attn_proj", "lora_te_nothing", "x"])
def test_what_is_no_module_is_not_found(spelt):
    assert find(spelt, FAMILIES["sd1"]) == ()


@pytest.mark.parametrize("name", TINIES)
def test_no_two_modules_share_a_name_and_every_module_is_found_again(name):
    family = TINIES[name]
    shapes = shapes_of(family)
    for table in (diffusers_modules(family), kohya_modules(family)):
        assert len(set(table.values())) == len(table)
        for (part, module), spelt in table.items():
            assert find(spelt, family)[0][0].parameter("weight") == (part, f"{module}.weight")
    for part, table in module_tables(family).items():
        modules = {f"{each.rpartition('.')[0]}" for each in shapes[part]}
        assert {target.module for targets in table.values() for target in targets} == modules
        ours = {module.replace(".", "_") for module in modules}
        for flat in ours & set(table):  # our own flat name always means that module
            assert table[flat][0].module.replace(".", "_") == flat
