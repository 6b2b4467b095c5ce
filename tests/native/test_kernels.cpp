// The kernels without Python: every set of instructions gives the bits of cases.h, and reads and writes its own memory
// only (that part needs -fsanitize=address). Arguments: the sets that must be there; they alone are tested.
#include <algorithm>
#include <cstdio>
#include <functional>
#include <limits>
#include <string>
#include <thread>
#include <vector>

#include "cases.h"
#include "kernels.h"

using namespace quantformer;
using namespace cases;

namespace {

int failures = 0, checks = 0;

void check(bool holds, const InstructionSet& set, const char* what, const std::string& of) {
  ++checks;
  if (holds) return;
  if (++failures <= 20) std::printf("FAILED: %s, %s, %s\n", set.name, what, of.c_str());
}

std::string describe(std::initializer_list<std::pair<const char*, int64_t>> numbers) {
  std::string text;
  for (auto& [name, value] : numbers) {
    text += std::string(text.empty() ? "" : ", ") + name + " " + std::to_string(value);
  }
  return text;
}

// The functions of a set, each with memory of just the size that instruction_set.h promises

void test_quantize(const InstructionSet& set, Random& random) {
  for (int64_t n : {0, 1, 3, 7, 8, 9, 15, 16, 17, 31, 33, 64, 100}) {
    for (int largest : {1, 3, 15, 127, 255}) {
      const auto x = values(random, n), offset = random.reals(n, -2, 0), inverse = random.reals(n, 0.5f, 2);
      // Exact halves: nothing but the code is left of the value.
      for (int64_t i = 0; i < n; i += 2) {
        offset[i] = 0;
        inverse[i] = 1;
      }
      Exact<uint8_t> codes(n), expected(n);
      for (int64_t i = 0; i < n; ++i) expected[i] = code(x[i], offset[i], inverse[i], largest);
      set.quantize(x, offset, inverse, levels_up_to(largest, largest), n, codes);
      check(same_bits(codes, expected), set, "quantize", describe({{"n", n}, {"largest", largest}}));
    }
    for (const auto& levels : {std::vector{0, 1, 2, 5, 8, 11, 14, 17}, {0, 1, 2, 3, 4, 5, 8, 11, 14, 17, 20, 23}}) {
      const int knee = levels.size() == 8 ? 2 : 5;
      auto x = values(random, n), offset = random.reals(n, -2, 0), inverse = random.reals(n, 0.5f, 2);
      // Halfway between two levels, too.
      for (int64_t i = 0; i < n; i += 2) {
        offset[i] = 0;
        inverse[i] = 1;
        if (i % 4 == 0) x[i] = static_cast<float>(random.integer(0, 60)) / 2;
      }
      Exact<uint8_t> codes(n), expected(n);
      for (int64_t i = 0; i < n; ++i) expected[i] = nearest(x[i], offset[i], inverse[i], levels);
      set.quantize(x, offset, inverse, levels_up_to(levels.back(), knee), n, codes);
      check(same_bits(codes, expected), set, "levels of two step sizes", describe({{"n", n}, {"knee", knee}}));
    }
  }
}

void test_gelu(const InstructionSet& set, Random& random) {
  for (int64_t n : {0, 1, 7, 8, 9, 16, 17, 100}) {
    const auto x = values(random, n);
    // Also where GELU bends.
    for (int64_t i = 0; i < n; i += 2) x[i] = random.real(-6, 6);
    Exact<float> got(n), expected(n);
    for (int64_t i = 0; i < n; ++i) expected[i] = cases::gelu(x[i]);
    set.gelu(x, n, got);
    // What is not a number has no one pattern.
    for (auto made : {&got, &expected}) {
      for (float& y : *made) y = std::isnan(y) ? 0 : y;
    }
    check(same_bits(got, expected), set, "gelu", describe({{"n", n}}));
  }
}

void test_softmax(const InstructionSet& set, Random& random) {
  for (int64_t n : {1, 2, 7, 8, 9, 16, 17, 24, 49, 197}) {
    for (int64_t rows : {1, 4, 6}) {
      for (bool masked : {false, true}) {
        const int64_t stride = n + rows % 3;
        const auto got = random.reals(rows * n, -100, 100), masks = random.reals((rows - 1) * stride + n, -5, 5);
        masks[0] = -100;
        if (n > 1) masks[n - 1] = -std::numeric_limits<float>::infinity();
        Exact<float> expected(rows * n);
        for (int64_t r = 0; r < rows; ++r) {
          float* const row = expected + r * n;
          for (int64_t i = 0; i < n; ++i) row[i] = masked ? got[r * n + i] + masks[r * stride + i] : got[r * n + i];
          cases::softmax(row, n);
        }
        set.softmax(got, rows, masked ? masks.begin() : nullptr, stride, n);
        check(same_bits(got, expected), set, "softmax", describe({{"n", n}, {"rows", rows}, {"masked", masked}}));
      }
    }
  }
}

void test_layer_norm(const InstructionSet& set, Random& random) {
  for (int64_t n : {1, 2, 7, 8, 9, 16, 17, 192}) {
    for (int64_t rows : {1, 3, 4, 5, 9}) {
      const auto x = random.reals(rows * n, -4, 300), weight = random.reals(n, -2, 2), bias = random.reals(n, -1, 1);
      for (bool affine : {false, true}) {
        Exact<float> got(rows * n), expected(rows * n), again(rows * n);
        std::copy(x.begin(), x.end(), expected.begin());
        const LayerNorm norm = {affine ? weight.begin() : nullptr, affine ? bias.begin() : nullptr, 1e-5f};
        for (int64_t r = 0; r < rows; ++r) cases::layer_norm(expected + r * n, norm.weight, norm.bias, norm.epsilon, n);
        set.layer_norm(x, rows, norm.weight, norm.bias, norm.epsilon, n, got);
        const Norm job = {x, rows, n, norm, again};
        const bool right = quantformer_layer_norm(&job, 3, nullptr) == 0 && same_bits(again, expected);
        check(right && same_bits(got, expected), set, "LayerNorm", describe({{"n", n}, {"rows", rows}, {"affine", affine}}));
      }
    }
  }
}

void test_reorder(const InstructionSet& set, Random& random) {
  for (int64_t columns : {0, 1, 4, 15, 16, 17, 31, 32, 50, 100}) {
    for (int64_t groups : {1, 3, 16}) {
      for (int64_t rows : {1, 7, 15, 16}) {
        const Layout layout(random, columns, groups);
        const int64_t stride = (columns + 15) / 16 * 16, positions = layout.positions();
        const auto source = layout.source();
        Exact<uint8_t> in(kBlock * stride), out(rows * positions), expected(out.size), scratch((stride + 1) * kBlock);
        for (auto& code : in) code = static_cast<uint8_t>(random.integer(0, 255));
        for (int64_t i = 0; i < out.size; ++i) {
          const int64_t c = source[i % positions];
          expected[i] = c < columns ? in[i / positions * stride + c] : 0;
        }
        set.reorder({in, stride, columns, source, positions, out, rows, scratch});
        check(same_bits(out, expected), set, "reorder",
              describe({{"columns", columns}, {"groups", groups}, {"rows", rows}}));
      }
    }
  }
}

struct Shape {
  int64_t rows, columns, outputs, groups;
};

// All that one product has: made once, and then given to each function that takes a part of it.
struct Layer {
  Layer(Random& random, const Shape& shape, int bits, int activation_bits, int multiplier)
      : shape(shape), layout(random, shape.columns, shape.groups), source(layout.source()), extreme(random.integer(0, 3) == 0),
        weight(random, shape.outputs, shape.columns, bits, multiplier, extreme), largest((1 << activation_bits) - 1),
        x(activations(random, layout, shape.rows, largest, extreme)), group_scales(random.reals(shape.groups, 0.001f, 1)),
        multiples(shape.groups), units(shape.groups), merges(random.integer(0, 1) && make_multiples(random)), scale(random.reals(shape.outputs, -1, 1)), bias(random.reals(shape.outputs, -9, 9)),
        expected(shape.rows * shape.outputs) {
    for (int64_t i = 0; i < expected.size; ++i) {
      const int64_t row = i / shape.outputs, o = i % shape.outputs;
      expected[i] = output(layout, weight, x + row * layout.positions(), o, group_scales, scale[o], bias[o]);
    }
    name = describe({{"rows", shape.rows}, {"columns", shape.columns}, {"outputs", shape.outputs},
                     {"groups", shape.groups}, {"bits", bits}, {"of activations", activation_bits},
                     {"multiplier", multiplier}, {"merges", merges}, {"extreme", extreme}});
  }

  Product product(float* y) const {
    return {x, shape.rows, layout.positions(), largest, weight.packed, weight.width, shape.outputs, shape.columns,
            weight.bits, (1 << weight.bits) - 1, weight.multiplier, weight.addend, source, layout.positions(),
            layout.ends.data(), group_scales, shape.groups, merges ? multiples.begin() : nullptr,
            merges ? units.begin() : nullptr, scale, bias, y, shape.outputs, 0, nullptr, 0, nullptr, nullptr,
            0, 0};
  }

  // Scales that are multiples of few units, where nothing is rounded then: whether that is so.
  bool make_multiples(Random& random) {
    const int64_t largest_weight = std::abs(weight.addend), fit = 127 / largest_weight;
    const int64_t most = random.integer(0, 1) ? fit : std::min<int64_t>(15, fit);
    constexpr float kUnits[] = {0.125f, 0.625f};
    if (most < 1 || layout.positions() * largest * largest_weight * most * 5 >= 1 << 24) return false;
    const int64_t changes = random.integer(0, shape.groups);
    for (int64_t g = 0; g < shape.groups; ++g) {
      multiples[g] = static_cast<uint8_t>(random.integer(1, most));
      units[g] = kUnits[g < changes];
      group_scales[g] = static_cast<float>(multiples[g]) * units[g];
    }
    return true;
  }

  Shape shape;
  Layout layout;
  Exact<int32_t> source;
  bool extreme;  // all codes are the largest ones
  Weight weight;
  int largest;
  Exact<uint8_t> x;
  Exact<float> group_scales;
  Exact<uint8_t> multiples;
  Exact<float> units;
  bool merges;
  Exact<float> scale, bias, expected;
  std::string name;
};

template <typename W>
bool right_panel(const Layer& layer, const Exact<W>& panel, int64_t together) {
  for (int64_t k = 0; k < layer.layout.positions(); ++k) {
    if (layer.source[k] == layer.shape.columns) continue;
    for (int64_t o = 0; o < layer.shape.outputs; ++o) {
      const int64_t at = k / together * together * kPanel + o * together + k % together;
      if (panel[at] != layer.weight.at(o, layer.source[k])) return false;
    }
  }
  return true;
}

// One panel and one tile of a layer of at most kPanel outputs.
template <typename X, typename W>
void test_tile(const InstructionSet& set, const Layer& layer, const Plan& plan, void (*unpack)(const Panel&, W*),
               const TileFunction* tiles, int64_t together) {
  const auto& w = layer.weight;
  const int64_t positions = layer.layout.positions(), rows = layer.shape.rows, outputs = layer.shape.outputs;
  Exact<uint8_t> scratch(panel_scratch_bytes(w.columns));
  Exact<W> panel(positions * kPanel);
  const uint8_t* codes[kPanel];
  for (int64_t o = 0; o < outputs; ++o) codes[o] = w.packed + o * w.width;
  unpack({codes, outputs, w.columns, w.bits, w.multiplier, w.addend, layer.source, positions, scratch,
          nullptr, 0},
         panel);
  const std::string of = (sizeof(W) == 1 ? "bytes, " : "words, ") + layer.name;
  check(right_panel(layer, panel, together), set, "unpack", of);

  Exact<X> x(rows * positions);
  std::copy(layer.x.begin(), layer.x.end(), x.begin());
  Exact<float> scale(kPanel), bias(kPanel), y(rows * kPanel), sums(rows * kPanel);
  Exact<int32_t> carry(rows * kPanel);
  for (int o = 0; o < kPanel; ++o) scale[o] = bias[o] = 0;
  std::copy(layer.scale.begin(), layer.scale.end(), scale.begin());
  std::copy(layer.bias.begin(), layer.bias.end(), bias.begin());
  tiles[rows - 1]({x, positions, panel, plan.segments.data(), static_cast<int64_t>(plan.segments.size()), scale, bias,
                   y, kPanel, sums, carry});
  bool right = true;
  for (int64_t i = 0; i < layer.expected.size; ++i) {
    right = right && std::memcmp(&y[i / outputs * kPanel + i % outputs], &layer.expected[i], sizeof(float)) == 0;
  }
  check(right, set, "tile", of);
}

void test_tiles(const InstructionSet& set, Random& random, int bits, int activation_bits, int multiplier) {
  for (int64_t rows = 1; rows <= set.tile_rows; ++rows) {
    const int64_t columns = random.integer(0, 90), outputs = random.integer(1, kPanel);
    const Layer layer(random, {rows, columns, outputs, random.integer(1, 8)}, bits, activation_bits, multiplier);
    Plan made = plan(layer.product(nullptr), nullptr, set);
    if (!made.words) {
      test_tile<uint8_t, int8_t>(set, layer, made, set.unpack_bytes, set.bytes, 4);
      InstructionSet of_words = set;
      of_words.largest_byte = -1;
      made = plan(layer.product(nullptr), nullptr, of_words);
    }
    test_tile<int16_t, int16_t>(set, layer, made, set.unpack_words, set.words, 2);
  }
}

// Whole operators, as Python calls them

// Threads of their own, which take tasks at the same time and in no order.
int32_t in_threads(int64_t begin, int64_t end, int64_t, void (*work)(int64_t, int64_t, void*), void* context) {
  std::vector<std::thread> threads;
  for (int64_t at = begin; at < end; ++at) threads.emplace_back(work, at, at + 1, context);
  for (std::thread& thread : threads) thread.join();
  return 0;
}

// The weights of a job once more, in the order of the set in use, where they have few enough bits.
struct OrderedWeights {
  OrderedWeights(Product job, const Codes* then)
      : bytes(quantformer_plan_order(&job, then)), bits(job.ordered_bits), order(job.output_order), ordered(bytes),
        made(bytes == 0 || quantformer_order_weights(&job, then, ordered) == 0), zeros(job.outputs * job.code_stride) {
    std::fill(zeros.begin(), zeros.end(), 0);
  }

  // A job that knows of them. Where bytes serve, nothing else may be read: other codes are zeros.
  Product of(Product job, const InstructionSet& set) const {
    if (bytes == 0) return job;
    job.ordered = ordered;
    job.ordered_bits = bits;
    job.output_order = order;
    if (!plan(job, nullptr, set).words) job.codes = zeros;
    return job;
  }

  int64_t bytes;
  int bits;
  const int32_t* order;
  Exact<uint8_t> ordered;
  bool made;
  Exact<uint8_t> zeros;
};

void test_layer(const InstructionSet& set, const Layer& layer) {
  for (int threads : {1, 3}) {
    Exact<float> y(layer.expected.size);
    const Product job = layer.product(y);
    const int status = quantformer_multiply(&job, threads, threads > 1 ? in_threads : nullptr);
    check(status == 0 && same_bits(y, layer.expected), set, "multiply", layer.name);
    const OrderedWeights weights(job, nullptr);
    std::fill(y.begin(), y.end(), 0.0f);
    const Product ordered = weights.of(job, set);
    const bool ran = quantformer_multiply(&ordered, threads, threads > 1 ? in_threads : nullptr) == 0;
    check(weights.made && ran && same_bits(y, layer.expected), set, "multiply, ordered weights", layer.name);
  }
}

// Codes above the largest one give anything, and nothing else is read (which the address sanitizer sees).
void test_codes_too_large(const InstructionSet& set, Random& random) {
  const Layer layer(random, {9, 100, 100, 2}, 2, 2, 1);
  Exact<float> y(layer.expected.size);
  Exact<uint8_t> x(layer.x.size);
  for (auto& code : x) code = static_cast<uint8_t>(random.integer(0, 255));
  Product job = layer.product(y);
  job.x = x;
  const OrderedWeights weights(job, nullptr);
  const Product ordered = weights.of(job, set);
  check(quantformer_multiply(&ordered, 1, nullptr) == 0, set, "codes too large", layer.name);
}

// Codes that a product reads, of what another one gave.
Codes codes_for(const Layer& reader, int64_t rows, const Exact<float>& offset, const Exact<float>& inverse, bool gelu) {
  return {nullptr, rows, reader.shape.columns, offset, inverse, reader.largest, reader.largest, gelu, reader.source,
          reader.layout.positions(), nullptr, nullptr, nullptr, 0, 0, 0};
}

// Of each image the first rows have scales and codes of their own: all together, and each row by itself.
void test_first_rows(const InstructionSet& set, Random& random, int bits, int first_bits, int64_t first_rows) {
  const int64_t images = 3, image_rows = 6, rows = images * image_rows;
  const Layer layer(random, {rows, 37, 21, 3}, bits, bits, 1);
  const int64_t positions = layer.layout.positions(), outputs = layer.shape.outputs, columns = layer.shape.columns;
  const auto group_scales = random.reals(3, 0.001f, 1), bias = random.reals(outputs, -9, 9);
  const auto is_first = [&](int64_t row) { return row % image_rows < first_rows; };
  Product others = layer.product(nullptr), first = others;
  first.largest_x = (1 << first_bits) - 1;
  first.group_scales = group_scales;
  first.multiples = nullptr;
  first.bias = bias;
  Exact<uint8_t> x(rows * positions);
  for (int64_t i = 0; i < x.size; ++i) {
    const bool padding = layer.source[i % positions] == columns;
    const int largest = is_first(i / positions) ? first.largest_x : others.largest_x;
    x[i] = padding ? 0 : static_cast<uint8_t>(random.integer(0, largest));
  }
  Exact<float> got(rows * outputs), expected(rows * outputs);
  bool ran = true;
  for (int64_t row = 0; row < rows; ++row) {
    Product one = is_first(row) ? first : others;
    one.x = x + row * positions;
    one.rows = 1;
    one.y = expected + row * outputs;
    ran = ran && quantformer_multiply(&one, 1, nullptr) == 0;
  }
  others.x = x;
  others.y = got;
  others.first = &first;
  others.first_rows = first_rows;
  others.image_rows = image_rows;
  ran = ran && quantformer_multiply(&others, 3, in_threads) == 0;
  check(ran && same_bits(got, expected), set, "multiply, first rows", layer.name);

  // To codes: of a product, and of numbers.
  const Layer reader(random, {rows, outputs, 4, 2}, bits, bits, 1);
  const auto reader_offset = random.reals(outputs, -2, 0), reader_inverse = random.reals(outputs, 0.5f, 2);
  Codes then = codes_for(reader, rows, reader_offset, reader_inverse, true), first_then = then;
  first_then.offset = reader_inverse;
  first_then.largest = first_then.knee = first.largest_x;
  Exact<uint8_t> codes(rows * then.positions), stepped(rows * then.positions), again(rows * then.positions);
  for (int64_t row = 0; row < rows; ++row) {
    Codes one = is_first(row) ? first_then : then;
    one.x = expected + row * outputs;
    one.rows = 1;
    one.codes = stepped + row * then.positions;
    ran = ran && quantformer_quantize(&one, 1, nullptr) == 0;
  }
  then.first = &first_then;
  then.first_rows = first_rows;
  then.image_rows = image_rows;
  then.codes = codes;
  others.y = nullptr;
  ran = ran && quantformer_multiply_to_codes(&others, &then, 3, in_threads) == 0;
  check(ran && same_bits(codes, stepped), set, "multiply to codes, first rows", layer.name);
  then.x = expected;
  then.codes = again;
  ran = quantformer_quantize(&then, 3, in_threads) == 0;
  check(ran && same_bits(again, stepped), set, "codes, first rows", layer.name);
}

void test_codes(const InstructionSet& set, Random& random, int64_t rows, int64_t channels, int64_t groups) {
  const Layout layout(random, channels, groups);
  const auto x = values(random, rows * channels);
  const auto offset = random.reals(channels, -2, 0), inverse = random.reals(channels, 0.5f, 2);
  const auto source = layout.source();
  const std::string of = describe({{"rows", rows}, {"channels", channels}, {"groups", groups}});
  for (bool ordered : {false, true}) {
    const int64_t positions = ordered ? layout.positions() : channels;
    Exact<uint8_t> codes(rows * positions), expected(rows * positions);
    for (int64_t i = 0; i < codes.size; ++i) {
      const int64_t c = ordered ? source[i % positions] : i % positions;
      expected[i] = c < channels ? code(x[i / positions * channels + c], offset[c], inverse[c], 15) : 0;
    }
    const int32_t* order = ordered ? source.begin() : nullptr;
    Codes job = {x, rows, channels, offset, inverse, 15, 15, 0, order, positions, codes, nullptr, nullptr, 0, 0, 0};
    check(quantformer_quantize(&job, 3, in_threads) == 0 && same_bits(codes, expected), set, "codes", of);
    for (int64_t i = 0; i < codes.size; ++i) {
      const int64_t c = ordered ? source[i % positions] : i % positions;
      const float made = c < channels ? cases::gelu(x[i / positions * channels + c]) : 0;
      expected[i] = c < channels ? code(made, offset[c], inverse[c], 15) : 0;
    }
    job.gelu = 1;
    check(quantformer_quantize(&job, 3, in_threads) == 0 && same_bits(codes, expected), set, "codes of gelu", of);

    // Of rows in which all is finite.
    const auto finite = random.reals(rows * channels, -4, 9);
    Exact<float> normed(rows * channels);
    const LayerNorm norm = {inverse, offset, 1e-5f};
    const Norm norm_job = {finite, rows, channels, norm, normed};
    job.gelu = 0;
    job.x = normed;
    Exact<uint8_t> in_two(codes.size);
    job.codes = in_two;
    const bool ran = quantformer_layer_norm(&norm_job, 3, in_threads) == 0 && quantformer_quantize(&job, 1, nullptr) == 0;
    job.x = finite;
    job.codes = codes;
    job.norm = &norm;
    check(ran && quantformer_quantize(&job, 3, in_threads) == 0 && same_bits(codes, in_two), set, "codes of LayerNorm", of);
  }
}

struct AttentionShape {
  int64_t batch, heads, queries, keys, size;
};

// Heads lie between tokens, as a projection leaves them; `[batch, tokens, heads, size]`.
struct Tokens {
  Tokens(Random& random, const AttentionShape& s, int64_t tokens)
      : values(random.reals(s.batch * tokens * s.heads * s.size, -3, 3)),
        strides{tokens * s.heads * s.size, s.size, s.heads * s.size} {}
  float at(int64_t b, int64_t h, int64_t t, int64_t d) const {
    return values[b * strides[0] + h * strides[1] + t * strides[2] + d];
  }
  Exact<float> values;
  int64_t strides[3];
};

using Visit = std::function<void(int64_t index, int64_t batch, int64_t head, int64_t query, int64_t key)>;

void for_each_score(const AttentionShape& s, const Visit& visit) {
  int64_t i = 0;
  for (int64_t b = 0; b < s.batch; ++b) {
    for (int64_t h = 0; h < s.heads; ++h) {
      for (int64_t q = 0; q < s.queries; ++q) {
        for (int64_t k = 0; k < s.keys; ++k) visit(i++, b, h, q, k);
      }
    }
  }
}

void test_probabilities(const InstructionSet& set, Random& random, const AttentionShape& s, int bits, bool masked,
                        const std::string& of) {
  const int largest = (1 << bits) - 1;
  const Operand operands[] = {{0.1f, 10, -1.5f}, {0.07f, 1 / 0.07f, -0.75f}};
  const Tokens query(random, s, s.queries), key(random, s, s.keys);
  const int64_t scores = s.batch * s.heads * s.queries * s.keys;
  Exact<float> expected(scores), got(scores);
  // One for all heads, as Swin's shift mask is.
  const auto mask = random.reals(s.batch * s.queries * s.keys, -3, 3);
  const float scaling = 0.125f;
  for_each_score(s, [&](int64_t i, int64_t b, int64_t h, int64_t q, int64_t k) {
    int64_t product = 0, of_key = 0;
    for (int64_t d = 0; d < s.size; ++d) {
      const int64_t kc = code(key.at(b, h, k, d), operands[1].offset, operands[1].inverse, largest) - (largest + 1) / 2;
      product += code(query.at(b, h, q, d), operands[0].offset, operands[0].inverse, largest) * kc;
      of_key += kc;
    }
    const float scale = operands[0].scale * operands[1].scale * scaling;
    const float shift = operands[0].offset * operands[1].scale * scaling;
    const float bias = static_cast<float>(of_key) * shift, scaled = static_cast<float>(product) * scale;
    expected[i] = scaled + bias;
    if (masked) expected[i] += mask[(b * s.queries + q) * s.keys + k];
  });
  for (int64_t i = 0; i < scores; i += s.keys) cases::softmax(expected + i, s.keys);
  Probabilities job = {query.values, key.values, nullptr, nullptr, s.batch, s.heads, s.queries, s.keys,  s.size, {}, {},
                       masked ? mask.begin() : nullptr, {s.queries * s.keys, 0, s.keys}, operands, largest, scaling,
                       got, nullptr, 0};
  std::copy_n(query.strides, 3, job.query_strides);
  std::copy_n(key.strides, 3, job.key_strides);
  check(quantformer_probabilities(&job, 3, in_threads) == 0 && same_bits(got, expected), set, "probabilities", of);
}

void test_mix(const InstructionSet& set, Random& random, const AttentionShape& s, int bits, const std::string& of) {
  const int largest = (1 << bits) - 1;
  const Operand operand = {0.07f, 1 / 0.07f, -0.75f};
  const auto probabilities = random.reals(s.batch * s.heads * s.queries * s.keys, 0, 1);
  const Tokens value(random, s, s.keys);
  Exact<float> expected(s.batch * s.queries * s.heads * s.size), got(expected.size);
  for (int64_t i = 0; i < expected.size; ++i) {
    const int64_t d = i % s.size, h = i / s.size % s.heads, q = i / s.size / s.heads % s.queries;
    const int64_t b = i / s.size / s.heads / s.queries;
    const float* const row = probabilities + ((b * s.heads + h) * s.queries + q) * s.keys;
    const float inverse = static_cast<float>(largest) / *std::max_element(row, row + s.keys);
    int64_t product = 0, of_row = 0;
    for (int64_t k = 0; k < s.keys; ++k) {
      const int64_t pc = code(row[k], 0, inverse, largest);
      const int64_t vc = code(value.at(b, h, k, d), operand.offset, operand.inverse, largest) - (largest + 1) / 2;
      product += pc * vc, of_row += pc;
    }
    const float centre = static_cast<float>((largest + 1) / 2) * operand.scale, offset = operand.offset + centre;
    const float share = 1.0f / static_cast<float>(of_row), scaled = static_cast<float>(product) * operand.scale;
    const float mixed = scaled * share;
    expected[i] = mixed + offset;
  }
  Mixed job = {probabilities, value.values, nullptr, s.batch, s.heads, s.queries, s.keys, s.size, {}, &operand, largest, got};
  std::copy_n(value.strides, 3, job.value_strides);
  check(quantformer_mix(&job, 3, in_threads) == 0 && same_bits(got, expected), set, "mix", of);
}

// Modules in one call, and step by step.
void test_mlp(const InstructionSet& set, Random& random, int64_t rows, int64_t columns, int64_t hidden, int bits) {
  const Layer first(random, {rows, columns, hidden, 3}, bits, bits, 1), second(random, {rows, hidden, columns, 2}, bits, bits, 1);
  const auto offset = random.reals(hidden, -2, 0), inverse = random.reals(hidden, 0.5f, 2);
  Exact<float> got(rows * columns), expected(rows * columns);
  Codes between = codes_for(second, rows, offset, inverse, true);
  const Mlp job = {first.product(nullptr), between, second.product(got)};
  const bool ran = quantformer_mlp(&job, 3, in_threads) == 0;

  Exact<uint8_t> codes(rows * between.positions);
  between.x = first.expected;
  between.codes = codes;
  Product last = second.product(expected);
  last.x = codes;
  const bool stepped = quantformer_quantize(&between, 1, nullptr) == 0 && quantformer_multiply(&last, 1, nullptr) == 0;
  check(ran && stepped && same_bits(got, expected), set, "mlp", first.name);

  const OrderedWeights one(job.first, &job.between), other(job.second, nullptr);
  std::fill(got.begin(), got.end(), 0.0f);
  const Mlp ordered = {one.of(job.first, set), job.between, other.of(job.second, set)};
  const bool again = one.made && other.made && quantformer_mlp(&ordered, 3, in_threads) == 0;
  check(again && same_bits(got, expected), set, "mlp, ordered weights", first.name);
}

void test_attention_block(const InstructionSet& set, Random& random, const AttentionShape& s, int bits, bool masked) {
  const int64_t rows = s.batch * s.queries, width = s.heads * s.size, map = s.heads * s.queries * s.keys;
  const Shape shape = {rows, width, width, 2};
  // Of the same codes in the same order: the first one's.
  const Layer query(random, shape, bits, bits, 1), output(random, shape, bits, bits, 1);
  const auto offset = random.reals(width, -2, 0), inverse = random.reals(width, 0.5f, 2);
  const Operand operands[] = {{0.1f, 10, -1.5f}, {0.07f, 1 / 0.07f, -0.75f}, {0.07f, 1 / 0.07f, -0.75f}};
  const auto mask = random.reals(map, -3, 3);
  Exact<float> got(rows * width), expected(rows * width);
  Product projection = query.product(nullptr), value = projection;
  const auto other_scale = random.reals(width, -1, 1);
  value.scale = other_scale;
  Probabilities scores = {nullptr, nullptr, nullptr, nullptr, s.batch, s.heads, s.queries, s.keys, s.size, {}, {}, nullptr, {},
                          operands, 255, 0.125f, nullptr, nullptr, 0};
  if (masked) {
    const int64_t strides[] = {0, s.queries * s.keys, s.keys};
    scores.mask = mask;
    std::copy_n(strides, 3, scores.mask_strides);
  }
  Mixed mix = {nullptr, nullptr, nullptr, s.batch, s.heads, s.queries, s.keys, s.size, {}, operands + 2, 255, nullptr};
  Codes between = codes_for(output, rows, offset, inverse, false);
  const AttentionBlock job = {projection, projection, value, scores, mix, between, output.product(got)};
  const bool ran = quantformer_attention_block(&job, 3, in_threads) == 0;

  Exact<float> probabilities(s.batch * map), values(rows * width), mixed(rows * width);
  Exact<uint8_t> codes(rows * between.positions);
  value.y = values;
  const int64_t strides[] = {s.queries * width, s.size, width};
  scores.query = scores.key = query.expected;
  scores.probabilities = probabilities;
  mix.probabilities = probabilities;
  mix.value = values;
  mix.output = mixed;
  for (auto of : {scores.query_strides, scores.key_strides, mix.value_strides}) std::copy_n(strides, 3, of);
  between.x = mixed;
  between.codes = codes;
  Product last = output.product(expected);
  last.x = codes;
  const bool stepped = quantformer_multiply(&value, 1, nullptr) == 0 &&
                       quantformer_probabilities(&scores, 1, nullptr) == 0 && quantformer_mix(&mix, 1, nullptr) == 0 &&
                       quantformer_quantize(&between, 1, nullptr) == 0 && quantformer_multiply(&last, 1, nullptr) == 0;
  check(ran && stepped && same_bits(got, expected), set, "attention block", query.name);
}

// By itself, of its x, to where its multilayer perceptron says.
bool run_block(const Block& job, int64_t threads = 3) {
  const Block* const one = &job;
  const Blocks all = {&one, 1, job.x, job.mlp.second.y};
  return quantformer_blocks(&all, threads, threads > 1 ? in_threads : nullptr) == 0;
}

// With so many windows in an image, 0 for none, tokens are those of the image turned round, and one is padding.
void test_block(const InstructionSet& set, Random& random, const AttentionShape& s, int bits, int64_t windows) {
  const int64_t images = s.batch / std::max<int64_t>(1, windows), image_tokens = s.queries * std::max<int64_t>(1, windows);
  const int64_t tokens = images * image_tokens, image_rows = image_tokens - (windows > 0), rows = images * image_rows;
  const int64_t width = s.heads * s.size;
  const Shape square = {tokens, width, width, 2};
  const Layer query(random, square, bits, bits, 1), output(random, square, bits, bits, 1);
  const Layer first(random, {rows, width, width + 3, 2}, bits, bits, 1);
  const Layer second(random, {rows, width + 3, width, 2}, bits, bits, 1);
  const auto x = random.reals(rows * width, -2, 2);
  const auto mask = random.reals(s.batch * s.heads * s.queries * s.keys, -3, 3);
  const auto hidden_keys = random.reals(windows * s.queries * s.keys, -9, 0);
  const auto offset = random.reals(width + 3, -2, 0), inverse = random.reals(width + 3, 0.5f, 2);
  const auto weight = random.reals(width, -1, 1), bias = random.reals(width, -1, 1);
  const LayerNorm one = {weight, bias, 1e-5f}, other = {bias, nullptr, 1e-3f};
  const Operand operand = {0.1f, 10, -1.5f};
  const Operand operands[] = {operand, operand, operand, operand};
  const int largest = (1 << bits) - 1;
  const auto codes_of = [&](const Layer& reader, int64_t rows, bool gelu) {
    return codes_for(reader, rows, offset, inverse, gelu);
  };
  Exact<int32_t> order(image_tokens);
  for (int64_t i = 0; i < image_tokens; ++i) order[i] = static_cast<int32_t>(image_rows - 1 - i);
  Exact<float> got(rows * width), attended(tokens * width), hidden(rows * width), expected(rows * width);
  AttentionBlock attention = {
      query.product(nullptr), query.product(nullptr), query.product(nullptr),
      {nullptr, nullptr, nullptr, nullptr, s.batch, s.heads, s.queries, s.keys, s.size, {}, {}, nullptr, {}, operands, largest, 0.125f,
       nullptr, nullptr, 0},
      {nullptr, nullptr, nullptr, s.batch, s.heads, s.queries, s.keys, s.size, {}, operands + 2, largest, nullptr},
      codes_of(output, tokens, false), output.product(nullptr)};
  if (windows) {
    const int64_t strides[] = {s.heads * s.queries * s.keys, s.queries * s.keys, s.keys};
    attention.scores.mask = mask;
    std::copy_n(strides, 3, attention.scores.mask_strides);
    attention.scores.hidden = hidden_keys;
    attention.scores.windows = windows;
  }
  Block job = {x, one, other, nullptr, image_tokens, image_rows, codes_of(query, rows, false), attention,
               codes_of(first, rows, false), {first.product(nullptr), codes_of(second, rows, true), second.product(got)}};
  if (windows) job.order = order;
  const bool ran = run_block(job);

  const auto norm_codes = [&](Codes step, const LayerNorm* norm, const float* of, Exact<uint8_t>& codes) {
    step.norm = norm;
    step.x = of;
    step.codes = codes;
    return quantformer_quantize(&step, 1, nullptr) == 0;
  };
  // Of windows, the rows that attention reads, zeros for padding, before they become codes.
  Exact<float> read(tokens * width), normed(rows * width);
  std::copy(x.begin(), x.end(), normed.begin());
  for (int64_t row = 0; row < rows; ++row) {
    cases::layer_norm(normed + row * width, one.weight, one.bias, one.epsilon, width);
  }
  const auto row_of = [&](int64_t token) -> int64_t {
    if (!windows) return token;
    const int64_t row = order[token % image_tokens];
    return row < 0 ? -1 : row + token / image_tokens * image_rows;
  };
  for (int64_t i = 0; i < read.size; ++i) {
    const int64_t row = row_of(i / width);
    read[i] = row < 0 ? 0 : (windows ? normed : x)[row * width + i % width];
  }
  Exact<uint8_t> codes(tokens * job.before.positions), more(rows * job.after.positions);
  Codes reading = job.before;
  reading.rows = tokens;
  AttentionBlock attend = attention;
  attend.query.x = codes;
  attend.output.y = attended;
  bool stepped = norm_codes(reading, windows ? nullptr : &one, read, codes) &&
                 quantformer_attention_block(&attend, 1, nullptr) == 0;
  for (int64_t i = 0; i < attended.size; ++i) {
    const int64_t row = row_of(i / width), at = row * width + i % width;
    if (row >= 0) hidden[at] = x[at] + attended[i];
  }
  Mlp mlp = job.mlp;
  mlp.first.x = more;
  mlp.second.y = expected;
  stepped = stepped && norm_codes(job.after, &other, hidden, more) && quantformer_mlp(&mlp, 1, nullptr) == 0;
  for (int64_t i = 0; i < hidden.size; ++i) expected[i] += hidden[i];
  check(ran && stepped && same_bits(got, expected), set, windows ? "block of windows" : "block", query.name);
  std::fill(got.begin(), got.end(), 0.0f);
  check(run_block(job, 1) && same_bits(got, expected), set, "block, one thread", query.name);
  // One after the other.
  Exact<float> once(got.size), twice(got.size), thrice(got.size), in_one(got.size);
  Block next = job;
  bool each = true;
  for (const auto& [from, to] : {std::pair{x.begin(), once.begin()}, {once.begin(), twice.begin()}, {twice.begin(), thrice.begin()}}) {
    next.x = from;
    next.mlp.second.y = to;
    each = each && run_block(next);
  }
  const Block* const chain[] = {&job, &job, &job};
  const Blocks all = {chain, 3, x, in_one};
  check(each && quantformer_blocks(&all, 3, in_threads) == 0 && same_bits(in_one, thrice), set, "blocks", query.name);
  // The first rows of each image alone are those of all.
  for (int64_t kept = 1; !windows && kept < std::min<int64_t>(s.queries, 3); ++kept) {
    Exact<float> few(s.batch * kept * width), wanted(few.size);
    for (int64_t i = 0; i < few.size; ++i) {
      const int64_t row = i / width;
      wanted[i] = got[(row / kept * s.queries + row % kept) * width + i % width];
    }
    Block part = job;
    part.attention.scores.queries = part.attention.mix.queries = kept;
    part.mlp.second.y = few;
    check(run_block(part) && same_bits(few, wanted), set, "block, first rows", query.name);
  }
}

// `model` with images of which a number is not finite, the last one or any other.
void test_not_finite(const InstructionSet& set, Random& random, const Model& model, int64_t size, const std::string& of) {
  for (const float value : {std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::quiet_NaN()}) {
    for (const int64_t at : {model.numbers - 1, random.integer(0, model.numbers - 1)}) {
      Exact<float> images(model.numbers), untouched(size);
      std::copy_n(model.x, model.numbers, images.begin());
      std::fill(untouched.begin(), untouched.end(), -1.0f);
      images[at] = value;
      Model own = model;
      own.x = images;
      own.y = untouched;
      for (const int64_t threads : {1, 3}) {
        const bool right = quantformer_model(&own, threads, threads == 1 ? nullptr : in_threads) == kNotFinite;
        const bool same = std::all_of(untouched.begin(), untouched.end(), [](float y) { return y == -1.0f; });
        check(right && same, set, "model of what is not finite", of);
      }
    }
  }
}

// Patches of an image, tokens, LayerNorm, mean, and a classifier that has a LayerNorm of its own.
void test_model(const InstructionSet& set, Random& random, int64_t batch, int64_t width, int bits) {
  constexpr int64_t kRows = 11, kRuns = 3, kLength = 5, kImage = 90, kLeading = 2, kAll = kRows + kLeading, kClasses = 7;
  const Layer first(random, {batch * kRows, kRuns * kLength, width, 3}, bits, bits, 1);
  const Layer last(random, {batch, width, kClasses, 2}, bits, bits, 1);
  const auto images = random.reals(batch * kImage, -2, 2), lead = random.reals(kLeading * width, -2, 2);
  const auto positions = random.reals(kAll * width, -2, 2), weight = random.reals(width, -1, 1);
  const auto offset = random.reals(std::max<int64_t>(width, kRuns * kLength), -2, 0);
  const auto inverse = random.reals(offset.size, 0.5f, 2);
  const LayerNorm norm = {weight, nullptr, 1e-5f};
  Exact<int32_t> starts(kRows * kRuns), one_start(1);
  for (int32_t& start : starts) start = static_cast<int32_t>(random.integer(0, kImage - kLength));
  one_start[0] = 0;

  Exact<float> rows(batch * kRows * kRuns * kLength), made(batch * kRows * width), tokens(batch * kAll * width);
  for (int64_t i = 0; i < rows.size; ++i) {
    const int64_t run = i / kLength, image = run / (kRows * kRuns);
    rows[i] = images[image * kImage + starts[run % starts.size] + i % kLength];
  }
  const auto run_linear = [&](const Layer& layer, const float* x, int64_t rows, const LayerNorm* norm, float* y) {
    Codes codes = codes_for(layer, rows, offset, inverse, false);
    Exact<uint8_t> between(rows * codes.positions);
    codes.x = x;
    codes.norm = norm;
    codes.codes = between;
    Product product = layer.product(y);
    product.x = between;
    product.rows = rows;
    return quantformer_quantize(&codes, 1, nullptr) == 0 && quantformer_multiply(&product, 1, nullptr) == 0;
  };
  bool right = run_linear(first, rows, batch * kRows, nullptr, made);
  for (int64_t i = 0; i < tokens.size; ++i) {
    const int64_t token = i / width % kAll, image = i / width / kAll, at = i % width;
    const float from = token < kLeading ? lead[token * width + at] : made[(image * kRows + token - kLeading) * width + at];
    tokens[i] = from + positions[token * width + at];
  }
  for (int64_t row = 0; row < batch * kAll; ++row) cases::layer_norm(tokens + row * width, weight, nullptr, 1e-5f, width);
  Exact<float> means(batch * width), expected(batch * kClasses), got(expected.size);
  for (int64_t i = 0; i < means.size; ++i) {
    float lanes[8] = {};
    for (int64_t row = 0; row < kAll; ++row) lanes[row % 8] += tokens[(i / width * kAll + row) * width + i % width];
    means[i] = cases::sum_of_lanes(lanes) * static_cast<float>(1.0 / static_cast<double>(kAll));
  }
  right = right && run_linear(last, means, batch, &norm, expected);

  Linear patches = {{starts, kRows, kRuns, kLength, kImage}, nullptr, codes_for(first, batch * kRows, offset, inverse, false),
                    first.product(nullptr)};
  const ::Tokens all = {{lead, lead + width}, positions, batch, kLeading, kRows, width};
  const Norm normed = {nullptr, batch * kAll, width, norm, nullptr};
  const Mean mean = {batch, kAll, width};
  const Linear classifier = {{one_start, 1, 1, width, width}, &norm, codes_for(last, batch, offset, inverse, false),
                             last.product(nullptr)};
  const Step steps[] = {{kLinearStep, &patches, made.size},
                        {kTokensStep, &all, tokens.size},
                        {kNormStep, &normed, tokens.size},
                        {kMeanStep, &mean, means.size},
                        {kLinearStep, &classifier, got.size}};
  const Model model = {steps, 5, images.size, images, got};
  right = right && quantformer_model(&model, 3, in_threads) == 0;
  check(right && same_bits(got, expected), set, "model", first.name);
  if (batch > 0) test_not_finite(set, random, model, got.size, first.name);
  // Rows as they lie.
  patches.runs.starts = nullptr;
  const Model from_rows = {steps, 5, rows.size, rows, got};
  check(quantformer_model(&from_rows, 1, nullptr) == 0 && same_bits(got, expected), set, "model of rows", first.name);
}

void test(const InstructionSet& set) {
  Random random(0);
  quantformer_use_instruction_set(set.name);
  check(&current() == &set, set, "choice", "by name");
  test_quantize(set, random);
  test_gelu(set, random);
  test_softmax(set, random);
  test_layer_norm(set, random);
  test_reorder(set, random);
  for (int bits = 1; bits <= 8; ++bits) {
    for (int of_activations = 2; of_activations <= 8; ++of_activations) {
      for (int multiplier : {1, 2}) {
        test_tiles(set, random, bits, of_activations, multiplier);
        const int64_t rows = random.integer(1, 30), outputs = random.integer(1, 50);
        const Shape any = {rows, random.integer(1, 90), outputs, random.integer(1, 9)};
        for (const Shape& shape : {Shape{1, 1, 1, 1}, {7, 33, 17, 5}, any}) {
          test_layer(set, Layer(random, shape, bits, of_activations, multiplier));
        }
      }
    }
  }
  // Groups of one channel each; groups that are longer than narrow sums; more tasks than panels; nothing at all.
  for (const Shape& shape : {Shape{3, 24, 16, 200}, {2, 1500, 5, 1}, {2, 1500, 5, 2}, {600, 12, 20, 2}, {0, 9, 9, 2},
                             {3, 9, 0, 2}, {3, 0, 9, 2}, {0, 0, 0, 1}}) {
    for (int bits : {1, 4, 8}) test_layer(set, Layer(random, shape, bits, bits == 1 ? 2 : bits, 1));
  }
  // Matrices: blocks and parts of one, groups of several steps and of a part of one, fewer groups than are in work at a time.
  for (const Shape& shape : {Shape{8, 64, 16, 1}, {16, 50, 33, 2}, {17, 130, 16, 1}, {49, 300, 40, 3}, {300, 250, 50, 8},
                             {31, 1000, 7, 5}}) {
    for (int bits : {1, 2, 4, 8}) {
      for (int multiplier : {1, 2}) test_layer(set, Layer(random, shape, bits, bits == 1 ? 2 : bits, multiplier));
    }
  }
  // Pairs: several panels and parts of one, groups of several runs, and one that is too long.
  for (const Shape& shape : {Shape{9, 57, 200, 2}, {5, 300, 97, 2}, {131, 40, 96, 3}, {2, 3640, 33, 1}, {2, 3700, 33, 1}}) {
    for (int bits : {1, 2}) {
      for (int multiplier : {1, 2}) test_layer(set, Layer(random, shape, bits, 2, multiplier));
    }
  }
  test_codes_too_large(set, random);
  for (int bits : {2, 3, 4, 8}) {
    for (int first_bits : {2, 4, 8}) {
      for (int64_t first_rows : {1, 2, 6}) test_first_rows(set, random, bits, first_bits, first_rows);
    }
  }
  // Rows in several parts, of bytes and of words.
  for (int bits : {4, 8}) test_mlp(set, random, 400, 5, 20, bits);
  for (int64_t rows : {0, 1, 15, 16, 33}) {
    for (int64_t channels : {1, 9, 16, 40, 4000}) test_codes(set, random, rows, channels, channels / 5 + 1);
  }
  for (int bits : {1, 2, 3, 4, 8}) {
    for (int64_t width : {1, 9, 40, 900}) {
      for (int64_t batch : {0, 1, 3}) test_model(set, random, batch, width, bits);
    }
    test_model(set, random, 60, 9, bits);
  }
  // Those of 130 queries are worked on in two parts.
  for (int bits = 1; bits <= 8; ++bits) {
    for (const AttentionShape& s : {AttentionShape{1, 1, 1, 1, 1}, {2, 3, 7, 5, 9}, {1, 2, 17, 20, 32}, {2, 1, 130, 7, 5},
                                    {1, 1, 2, 1, 600}, {1, 1, 3, 600, 1}, {1, 1, 0, 3, 4}, {0, 2, 3, 3, 4}}) {
      const std::string of =
          describe({{"queries", s.queries}, {"keys", s.keys}, {"head size", s.size}, {"bits", bits}});
      for (bool masked : {false, true}) test_probabilities(set, random, s, bits, masked, of);
      test_mix(set, random, s, bits, of);
    }
    for (const AttentionShape& s : {AttentionShape{1, 1, 1, 1, 1}, {2, 3, 7, 7, 9}, {1, 2, 17, 17, 32}, {1, 2, 130, 130, 3},
                                    {0, 2, 3, 3, 4}}) {
      for (bool masked : {false, true}) test_attention_block(set, random, s, bits, masked);
      for (int64_t windows : {0, 1}) test_block(set, random, s, bits, windows);
      test_mlp(set, random, s.batch * s.queries, s.heads * s.size, s.size + 3, bits);
    }
  }
  // In parts: of some images, and of some windows of one. With fewer bits, all probabilities would have the largest code.
  for (int bits : {5, 8}) {
    test_block(set, random, {50, 2, 17, 17, 3}, bits, 0);
    test_block(set, random, {300, 1, 4, 4, 5}, bits, 2);
    test_block(set, random, {75, 2, 25, 25, 3}, bits, 75);
    test_block(set, random, {40, 2, 49, 49, 3}, bits, 20);
  }
}

}  // namespace

int main(int count, char** names) {
  std::vector<const InstructionSet*> found;
  for (auto find : {plain, avx2, avx512, amx, neon, neon_dotprod}) {
    if (const InstructionSet* set = find()) found.push_back(set);
  }
  std::vector<const InstructionSet*> asked = count > 1 ? std::vector<const InstructionSet*>{} : found;
  for (int i = 1; i < count; ++i) {
    const InstructionSet* named = nullptr;
    for (auto set : found) named = std::string(names[i]) == set->name ? set : named;
    if (named == nullptr) {
      std::printf("FAILED: no %s here\n", names[i]);
      return 1;
    }
    asked.push_back(named);
  }
  for (auto set : asked) {
    const int before = checks;
    test(*set);
    std::printf("%s: %d checks\n", set->name, checks - before);
  }
  std::printf(failures ? "%d of %d checks FAILED\n" : "all right\n", failures, checks);
  return failures != 0;
}
