// llama_driver.cpp: llama.cpp on given token ids, one line an event, so that it does the same work as the other engines.
//
//   llama-driver MODEL TOKENS --prompt N --decode N [--threads 2] [--repack 0] [--batch 512] [--greedy 1]
//                [--experts FILE] [--logits FILE]
//
// TOKENS is a text file of ids. The first --prompt of them go in together, the next --decode one at a time; with --greedy the
// most probable token goes in instead. llama-bench takes random tokens and reports one mean, which can't be compared token by token.
// Lines: "load SECONDS", "prompt TOKENS SECONDS", "token INDEX SECONDS ARGMAX". --experts writes "LAYER POSITION ID ..." a line,
// --logits float32 rows: the prompt's last position and each decoded token.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <string>
#include <vector>

#include "ggml-backend.h"
#include "ggml.h"
#include "llama.h"

struct Recorder {
    std::FILE * experts = nullptr;
    int position = 0;
};

static double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Called twice a tensor: to ask whether it is wanted, then with its data.
static bool record(ggml_tensor * tensor, bool ask, void * data) {
    static const char name[] = "ffn_moe_topk-";
    const bool wanted = std::strncmp(tensor->name, name, sizeof(name) - 1) == 0;
    if (ask || !wanted) {
        return wanted || !ask;
    }
    Recorder & recorder = *static_cast<Recorder *>(data);
    for (int64_t row = 0; row < tensor->ne[1]; ++row) {
        std::vector<int32_t> ids(tensor->ne[0]);
        ggml_backend_tensor_get(tensor, ids.data(), row * tensor->nb[1], ids.size() * sizeof(int32_t));
        std::fprintf(recorder.experts, "%s %d", tensor->name + sizeof(name) - 1, recorder.position + static_cast<int>(row));
        for (int32_t id : ids) {
            std::fprintf(recorder.experts, " %d", id);
        }
        std::fputc('\n', recorder.experts);
    }
    return true;
}

static int fail(const char * what) {
    std::fprintf(stderr, "llama-driver: %s\n", what);
    return 1;
}

int main(int argc, char ** argv) {
    if (argc < 3) {
        return fail("usage: llama-driver MODEL TOKENS --prompt N --decode N, see the source");
    }
    std::map<std::string, std::string> options = {{"--prompt", "1"}, {"--decode", "8"}, {"--threads", "2"}, {"--repack", "0"},
                                                  {"--batch", "512"}, {"--greedy", "0"}, {"--experts", ""}, {"--logits", ""}};
    for (int i = 3; i < argc; i += 2) {
        if (!options.count(argv[i]) || i + 1 == argc) {
            return fail("unknown option, or one without a value");
        }
        options[argv[i]] = argv[i + 1];
    }
    const auto number = [&](const char * name) { return std::atoi(options[name].c_str()); };
    const int prompt = number("--prompt"), decode = number("--decode");

    std::vector<llama_token> tokens;
    std::ifstream file(argv[2]);
    for (llama_token id; file >> id;) {
        tokens.push_back(id);
    }
    const bool greedy = number("--greedy");
    if (prompt < 1 || static_cast<int>(tokens.size()) < prompt + (greedy ? 0 : decode)) {
        return fail("TOKENS holds fewer ids than were asked for");
    }

    llama_log_set([](ggml_log_level level, const char * text, void *) {
        if (level >= GGML_LOG_LEVEL_WARN && level != GGML_LOG_LEVEL_CONT) std::fputs(text, stderr);
    }, nullptr);
    double started = now();
    llama_backend_init();
    llama_model_params model_params = llama_model_default_params();
    model_params.load_mode = LLAMA_LOAD_MODE_MMAP;
    model_params.use_extra_bufts = number("--repack");
    llama_model * model = llama_model_load_from_file(argv[1], model_params);
    if (!model) {
        return fail("the model does not load");
    }
    Recorder recorder;
    llama_context_params context_params = llama_context_default_params();
    context_params.n_ctx = prompt + decode + 8;
    context_params.n_batch = context_params.n_ubatch = number("--batch");
    context_params.n_threads = context_params.n_threads_batch = number("--threads");
    if (!options["--experts"].empty()) {
        recorder.experts = std::fopen(options["--experts"].c_str(), "w");
        context_params.cb_eval = record;
        context_params.cb_eval_user_data = &recorder;
    }
    std::FILE * logits_file = options["--logits"].empty() ? nullptr : std::fopen(options["--logits"].c_str(), "wb");
    llama_context * context = llama_init_from_model(model, context_params);
    if (!context) {
        return fail("no context");
    }
    std::printf("load %.3f\n", now() - started);
    std::fflush(stdout);

    const int vocabulary = llama_vocab_n_tokens(llama_model_get_vocab(model));
    llama_token best = 0;
    const auto finish = [&]() {
        const float * logits = llama_get_logits_ith(context, -1);
        best = 0;
        for (llama_token i = 1; i < vocabulary; ++i) {
            if (logits[i] > logits[best]) best = i;
        }
        if (logits_file) std::fwrite(logits, sizeof(float), vocabulary, logits_file);
    };
    const int step = number("--batch");
    started = now();
    for (int done = 0; done < prompt; done += step) {
        const int count = std::min(step, prompt - done);
        if (llama_decode(context, llama_batch_get_one(tokens.data() + done, count))) {
            return fail("llama_decode of the prompt");
        }
        recorder.position += count;
    }
    finish();
    std::printf("prompt %d %.4f\n", prompt, now() - started);
    std::fflush(stdout);
    for (int i = 0; i < decode; ++i) {
        llama_token token = greedy ? best : tokens[prompt + i];
        started = now();
        if (llama_decode(context, llama_batch_get_one(&token, 1))) {
            return fail("llama_decode of a token");
        }
        recorder.position += 1;
        finish();
        std::printf("token %d %.5f %d\n", i, now() - started, best);
        std::fflush(stdout);
    }
    if (recorder.experts) std::fclose(recorder.experts);
    if (logits_file) std::fclose(logits_file);
    llama_free(context);
    llama_model_free(model);
    return 0;
}
