// What the Hub makes of a chat template for Ollama, and conversations rendered as a browser does.
import { readFileSync } from "node:fs";
import { Template } from "@huggingface/jinja";
import { convertGGUFTemplateToOllama } from "@huggingface/ollama-utils";

const { template, bos, eos, conversations } = JSON.parse(readFileSync(0, "utf8"));
const converted = convertGGUFTemplateToOllama({ chat_template: template, bos_token: bos, eos_token: eos });
const parsed = new Template(template);
const rendered = {};
for (const [name, { messages, asks }] of Object.entries(conversations)) {
  try {
    rendered[name] = parsed.render({ messages, add_generation_prompt: asks, bos_token: bos, eos_token: eos });
  } catch (error) {
    rendered[name] = `error: ${error.message}`;
  }
}
console.log(JSON.stringify({ converted: converted?.ollama?.template, rendered }));
