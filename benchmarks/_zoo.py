"""The models that pruning is tried on: the smallest of every timm and torchvision family, and small transformers.

A family is a module of timm.models or torchvision.models that makes image classifiers; its smallest variant is the one
with the fewest parameters, counted over all of timm 1.0.31 and torchvision 0.28 (where timm's is one of the toys for
its own tests, `test_...`, the smallest real one comes beside it).  Pixels are the fewest that it takes, from 64 on.
Weights are random.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

# family, model, parameters, pixels
TIMM = """
beit                       beit_base_patch16_224               86530984 224
byoanet                    halonet_h1                           8100056 256
byobnet                    test_byobnet                          456856  64
byobnet                    mobileone_s1                         4825192  64
cait                       cait_xxs24_224                      11956264 224
coat                       coat_tiny                            5498540 224
convit                     convit_tiny                          5710512 224
convmixer                  convmixer_768_32                    21110248  64
convnext                   test_convnext                         272128  64
convnext                   convnext_zepto_rms                   2155656  64
cpubone                    cpubone_nano                         6519700  64
crossvit                   crossvit_tiny_240                    7014800  64
csatv2                     csatv2                              11103444  64
cspnet                     cs3darknet_focus_s                   3274728  64
cspnext                    cspnext_tiny                         2733700  64
davit                      davit_tiny                          28360168  64
deit                       deit_tiny_patch16_224                5717416 224
densenet                   densenet121                          7978856  64
dla                        dla46x_c                             1068440  64
dpn                        dpn48b                               9126226  64
edgenext                   edgenext_xx_small                    1327216  64
efficientformer            efficientformer_l1                  12289928 224
efficientformer_v2         efficientformerv2_s0                 3600256 224
efficientnet               test_efficientnet                     356196  64
efficientnet               mobilenetv2_035                      1677128  64
efficientvim               efficientvim_m1                      6679458  64
efficientvit_mit           efficientvit_b0                      3410008  64
efficientvit_msra          efficientvit_m0                      2349436  64
eva                        eva02_tiny_patch14_336               5756584 336
fasternet                  fasternet_t0                         3905500  64
fastvit                    fastvit_t8                           4026232  64
focalnet                   focalnet_tiny_srf                   28427116  64
gcvit                      gcvit_xxtiny                        11995428 224
ghostnet                   ghostnet_050                         2587292  64
hardcorenas                hardcorenas_b                        5176544  64
hgnet                      hgnetv2_b0                           5996550  64
hiera                      hiera_tiny_224                      27910216 224
hieradet_sam2              hieradet_small                      34730344  64
hrnet                      hrnet_w18_small                     13187464  64
iformer                    iformer_t                            2886456  64
inception_next             inception_next_atto                  4156520  64
inception_resnet_v2        inception_resnet_v2                 55843464  96
inception_v3               inception_v3                        23834568  96
inception_v4               inception_v4                        42679816  96
lcnetv2                    lcnetv2_small                        4128552  64
levit                      levit_128s                           7777058 224
lowformer                  lowformer_b0                        14100472  64
mambaout                   test_mambaout                         447560  64
mambaout                   mambaout_femto                       7304536  64
maxxvit                    test_coatnet                          575480 160
maxxvit                    maxvit_pico_rw_256                   7457996 256
metaformer                 poolformerv2_s12                    11891712  64
mlp_mixer                  gmlp_ti16_224                        5867328 224
mobilenetv3                mobilenetv3_small_050                1593224  64
mobilenetv5                mobilenetv5_base                    82647976  64
mobilevit                  mobilevit_xxs                        1272024  64
mvitv2                     mvitv2_tiny                         24173320  64
naflexvit                  naflexvit_base_patch16_parfac_gap   86461672  64
nasnet                     nasnetalarge                        88753150  64
nest                       nest_tiny                           17057608 224
nextvit                    nextvit_small                       31763368  64
nfnet                      test_nfnet                            383080  64
nfnet                      nf_regnet_b0                         8764288  64
pit                        pit_ti_224                           4847272 224
pnasnet                    pnasnet5large                       86057668  64
pvt_v2                     pvt_v2_b0                            3666760  64
rdnet                      rdnet_tiny                          23863008  64
regnet                     regnetx_002                          2684792  64
repghost                   repghostnet_050                      2313968  64
repvit                     repvit_m1                            5485248  64
res2net                    res2next50                          24671464  64
resnest                    resnest14d                          10611688  64
resnet                     test_resnet                           469688  64
resnet                     resnet10t                            5435488  64
resnetv2                   resnetv2_18                         11687720  64
rexnet                     rexnet_100                           4796873  64
selecsls                   selecsls42                          30354952  64
senet                      legacy_seresnet18                   11778592  64
sequencer                  sequencer2d_s                       27651688  64
shvit                      shvit_s1                             6330808  64
sknet                      skresnet18                          11958056  64
starnet                    starnet_s050                          542728  64
swiftformer                swiftformer_xs                       3475360  64
swin_transformer           swin_tiny_patch4_window7_224        28288354 224
swin_transformer_v2        swinv2_tiny_window16_256            28347154 256
swin_transformer_v2_cr     swinv2_cr_tiny_224                  28332124 224
tiny_vit                   tiny_vit_5m_224                     12082725  64
tnt                        tnt_s_legacy_patch16_224            23755336 224
tresnet                    tresnet_m                           31389032  64
twins                      twins_svt_small                     24060776  64
vgg                        vgg11                              132863336  64
visformer                  visformer_tiny                      10321368 224
vision_transformer         test_vit                              371240  64
vision_transformer         vit_tiny_patch16_224                 5717416 224
vision_transformer_hybrid  vit_tiny_r_s16_p8_224                6337704 224
vision_transformer_relpos  test_vit_relpos                       850147 160
vision_transformer_relpos  vit_srelpos_small_patch16_224       21973486 224
vision_transformer_sam     samvit_base_patch16_224             86457064  64
vitamin                    vitamin_small_224                   22173376 224
volo                       volo_d1_224                         26632040 224
vovnet                     ese_vovnet19b_slim_dw                1897752  64
xception                   legacy_xception                     22855952  64
xception_aligned           xception41p                         26907752  64
xcit                       xcit_nano_12_p8_224                  3049016  64
"""

TORCHVISION = """
alexnet                    alexnet                             61100840  64
convnext                   convnext_tiny                       28589128  64
densenet                   densenet121                          7978856  64
efficientnet               efficientnet_b0                      5288548  64
googlenet                  googlenet                            6624904  64
inception                  inception_v3                        23834568  96
maxvit                     maxvit_t                            30919624 224
mnasnet                    mnasnet0_5                           2218512  64
mobilenetv2                mobilenet_v2                         3504872  64
mobilenetv3                mobilenet_v3_small                   2542856  64
regnet                     regnet_y_400mf                       4344144  64
resnet                     resnet18                            11689512  64
shufflenetv2               shufflenet_v2_x0_5                   1366792  64
squeezenet                 squeezenet1_1                        1235496  64
swin_transformer           swin_t                              28288354  64
vgg                        vgg11                              132863336  64
vision_transformer         vit_b_16                            86567656 224
"""

TRANSFORMERS = ("bert", "gpt2", "llama", "qwen2", "qwen3", "mixtral", "t5", "vit", "whisper")

# With `--long`: the smallest of what goes by another name within a family of timm, below 60 million parameters.
MORE = """
byoanet                    botnet26t_256                       12488672 256
byoanet                    eca_botnext26ts_256                 10593301 256
byoanet                    halo2botnet50ts_256                 22635360 256
byoanet                    haloregnetz_b                       11680072 224
byoanet                    lambda_resnet26t                    10958272  64
byoanet                    lamhalobotnet50ts_256               22569824 256
byoanet                    sebotnet33ts_256                    13701984 256
byoanet                    sehalonet33ts                       13691712 256
byobnet                    bat_resnext26ts                     10731200 256
byobnet                    eca_resnext26ts                     10297988  64
byobnet                    gcresnet33ts                        19880698  64
byobnet                    gcresnext26ts                       10476600  64
byobnet                    gernet_s                             8173761  64
byobnet                    regnetz_b16                          9715480  64
byobnet                    repvgg_a0                            9108968  64
byobnet                    resnet32ts                          17963616  64
byobnet                    resnext26ts                         10297952  64
byobnet                    seresnet33ts                        19779200  64
byobnet                    seresnext26ts                       10388064  64
convnext                   convnextv2_atto                      3708400  64
cspnet                     cspdarknet53                        27642184  64
cspnet                     cspresnet50                         21616168  64
cspnet                     cspresnext50                        20569896  64
cspnet                     darknet17                           14304840  64
cspnet                     darknetaa53                         36022984  64
cspnet                     sedarknet21                         20950432  64
densenet                   densenetblur121d                     7998088  64
efficientnet               efficientnet_lite0                   4652008  64
efficientnet               efficientnetv2_rw_t                 13649388  64
efficientnet               fbnetc_100                           5572200  64
efficientnet               gc_efficientnetv2_rw_t              13677713  64
efficientnet               mixnet_s                             4134606  64
efficientnet               mnasnet_small                        2030264  64
efficientnet               mobilenet_edgetpu_100                4091432  64
efficientnet               semnasnet_050                        2082006  64
efficientnet               spnasnet_100                         4421616  64
efficientnet               tf_efficientnet_lite0                4652008  64
efficientnet               tf_efficientnetv2_b0                 7139704  64
efficientnet               tf_mixnet_s                          4134606  64
efficientnet               tinynet_e                            2042972  64
eva                        vit_pe_core_tiny_patch16_384         6141056 384
ghostnet                   ghostnetv3_050                       3395384  64
hgnet                      hgnet_tiny                          14735864  64
maxxvit                    coatnet_pico_rw_224                 10851364 224
maxxvit                    coatnext_nano_rw_224                14701244 224
maxxvit                    maxxvit_rmlp_nano_rw_256            16779628 256
maxxvit                    maxxvitv2_nano_rw_256               23696611 256
maxxvit                    test_maxvit                          1093252 160
metaformer                 caformer_s18                        26341656  64
metaformer                 convformer_s18                      26774448  64
metaformer                 poolformer_s12                      11915176  64
mlp_mixer                  gmixer_12_224                       12701080 224
mlp_mixer                  mixer_s16_224                       18528264 224
mlp_mixer                  resmlp_12_224                       15350872 224
mobilenetv3                fbnetv3_b                            8598464  64
mobilenetv3                lcnet_035                            1644370  64
mobilenetv3                tf_mobilenetv3_small_075             2041872  64
mobilevit                  mobilevitv2_050                      1370593  64
nfnet                      eca_nfnet_l0                        24143924  64
nfnet                      nf_ecaresnet26                      15995220  64
nfnet                      nf_resnet26                         15995176  64
nfnet                      nf_seresnet26                       17395976  64
nfnet                      nfnet_l0                            35074488  64
regnet                     regnetv_040                         20640640  64
regnet                     regnety_002                          3162996  64
regnet                     regnetz_005                          7122742  64
resnet                     ecaresnet26t                        16011916  64
resnet                     ecaresnetlight                      30162046  64
resnet                     ecaresnext26t_32x4d                 15406220  64
resnet                     resnetaa34d                         21816904  64
resnet                     resnetblur18                        11689512  64
resnet                     resnetrs50                          35691912  64
resnet                     resnext50_32x4d                     25028904  64
resnet                     seresnet18                          11779624  64
resnet                     seresnetaa50d                       28107256  64
resnet                     seresnext26t_32x4d                  16806976  64
rexnet                     rexnetr_100                          4883304  64
senet                      legacy_seresnext26_32x4d            16790280  64
sknet                      skresnext50_32x4d                   27479784  64
swin_transformer_v2        swinv2_tiny_window8_256             28347154 256
vision_transformer         flexivit_small                      22061416 240
vovnet                     eca_vovnet39b                       22600316  64
vovnet                     vovnet39a                           22600296  64
"""

# What ends within seconds, for `--quick`.
QUICK = ("test_resnet", "test_efficientnet", "starnet_s050", "test_vit", "bert")


@dataclass(frozen=True)
class Model:
    library: str
    family: str
    name: str
    pixels: int


def models(*, more: bool = False) -> list[Model]:
    """The zoo; `more`: with the other names within the families."""
    found = []
    for library, table in (("timm", TIMM), ("timm", MORE if more else ""), ("torchvision", TORCHVISION)):
        for family, name, _, pixels in map(str.split, table.strip().splitlines()):
            found.append(Model(library, family, name, int(pixels)))
    return found + [Model("transformers", name, name, 0) for name in TRANSFORMERS]


def build(library: str, name: str, pixels: int) -> tuple[nn.Module, Any]:
    """(model in evaluation mode, inputs of one sample), the same at every call."""
    torch.manual_seed(0)
    if library == "transformers":
        model, inputs = _transformer(name)
    elif library == "timm":
        import timm

        model, inputs = timm.create_model(name), torch.randn(1, 3, pixels, pixels)
    else:
        import torchvision

        # their auxiliary classifiers run in training only
        extra = {"aux_logits": False, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
        model, inputs = torchvision.models.get_model(name, **extra), torch.randn(1, 3, pixels, pixels)
    return model.eval(), inputs


def _transformer(name: str) -> tuple[nn.Module, Any]:
    """A model of the real structure with few, narrow layers; where the kind has it, two queries share one key."""
    import transformers as t

    words = {"vocab_size": 256, "use_cache": False}
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    grouped = {**words, **size, "num_key_value_heads": 2, "max_position_embeddings": 64}
    tokens = torch.randint(3, 256, (1, 16))
    text = {"input_ids": tokens}
    match name:
        case "bert":
            config = t.BertConfig(**words, **size, max_position_embeddings=64)
            return t.BertForSequenceClassification(config), text
        case "gpt2":
            return t.GPT2LMHeadModel(t.GPT2Config(**words, n_positions=64, n_embd=64, n_layer=2, n_head=4)), text
        case "llama":
            return t.LlamaForCausalLM(t.LlamaConfig(**grouped)), text
        case "qwen2":
            return t.Qwen2ForCausalLM(t.Qwen2Config(**grouped)), text
        case "qwen3":
            return t.Qwen3ForCausalLM(t.Qwen3Config(**grouped, head_dim=16)), text
        case "mixtral":
            config = t.MixtralConfig(**grouped, num_local_experts=4, num_experts_per_tok=2)
            return t.MixtralForCausalLM(config), text
        case "t5":
            config = t.T5Config(**words, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
            return t.T5ForConditionalGeneration(config), {**text, "decoder_input_ids": tokens[:, :8]}
        case "vit":
            config = t.ViTConfig(**size, image_size=32, patch_size=8, num_labels=10)
            return t.ViTForImageClassification(config), {"pixel_values": torch.randn(1, 3, 32, 32)}
        case "whisper":
            layers = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128}
            heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "d_model": 64, "num_mel_bins": 16}
            places = {"max_source_positions": 32, "max_target_positions": 32}
            special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
            config = t.WhisperConfig(**words, **layers, **heads, **places, **special)
            inputs = {"input_features": torch.randn(1, 16, 64), "decoder_input_ids": tokens[:, :8]}
            return t.WhisperForConditionalGeneration(config), inputs
    raise ValueError(name)
