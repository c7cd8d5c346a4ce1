// A tool loop of two turns by the AI SDK against a server of OpenAI's API: node tool_loop.mjs ADDRESS stream|whole
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const [address, how] = process.argv.slice(2);
const model = createOpenAICompatible({ name: "flash-moe", baseURL: `${address}/v1` })("demo");
const called = [];
const tools = {
  write_file: tool({
    description: "Write.",
    inputSchema: z.object({ path: z.string(), count: z.number().nullable().optional() }),
    execute: async (input) => {
      called.push(input);
      return { written: input.path };
    },
  }),
};

async function turn(messages) {
  const options = { model, messages, tools, stopWhen: stepCountIs(3), maxRetries: 0 };
  const result = how === "stream" ? streamText(options) : await generateText(options);
  if (how === "stream") await result.consumeStream();
  const response = await result.response;
  return { text: await result.text, reasoning: await result.reasoningText, messages: response.messages };
}

const messages = [{ role: "system", content: "Be brief." }, { role: "user", content: "Write a file." }];
const first = await turn(messages);
messages.push(...first.messages, { role: "user", content: "And another." });
const second = await turn(messages);
console.log(JSON.stringify({ called, texts: [first.text, second.text], reasoning: [first.reasoning, second.reasoning] }));
